"""What `graft train --dry-run` prints: the data and the plan of a run, in words."""

from __future__ import annotations

from loaders.tokenizer import Tokenizer
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.config import TrainConfig
from runtime.trainer.data.documents import read_documents
from runtime.trainer.model import check_base_fits
from runtime.trainer.plan import plan_run
from runtime.trainer.report.dry_run import describe_run
from runtime.trainer.step_data import mean_row


def describe(config: TrainConfig) -> str:
    """The whole plan; reads the data and the base's config, but no weight."""
    base = DeepseekConfig.from_dir(config.model)
    check_base_fits(config, base)
    documents, report = read_documents(config.data.train, config.data, Tokenizer.from_dir(config.model))
    tokens, targets = mean_row(config, documents)
    lines = [f"Data: {report.describe()}", "", describe_run(plan_run(base, config, tokens, targets))]
    if config.selection is not None:
        lines += ["", "selection leaves experts out before training; the numbers above count all of them"]
    return "\n".join(lines)
