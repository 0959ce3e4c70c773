"""What a run learns from and is scored on, read and checked against the base before any weight is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loaders.tokenizer import Tokenizer
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.config import TrainConfig
from runtime.trainer.data.documents import DataError, Document, read_documents, split_documents
from runtime.trainer.data.rows import RowStream


@dataclass(frozen=True)
class RunData:
    """What is learnt from and what is scored on; `num_steps` optimizer steps in all."""

    rows: RowStream
    documents: list[Document]
    evaluation: list[Document]
    num_steps: int


def read_run_data(config: TrainConfig, base: DeepseekConfig, tell: Callable[[str], None] | None = None) -> RunData:
    """Documents, rows and the number of steps; `tell` is given a line about each set.

    Raises DataError, CheckpointError, or ValueError if the run is too short.
    """
    tokenizer = Tokenizer.from_dir(config.model)
    documents, report = read_documents(config.data.train, config.data, tokenizer)
    lines = [f"training data: {report.describe()}"]
    evaluation: list[Document] = []
    if config.data.eval:
        evaluation, eval_report = read_documents(config.data.eval, config.data, tokenizer, role="evaluation")
        lines.append(f"evaluation data: {eval_report.describe()}")
    elif config.data.eval_fraction:
        documents, evaluation = split_documents(documents, config.data.eval_fraction)
    check_token_ids({"training": documents, "evaluation": evaluation}, base.vocab_size, tokenizer)
    if tell is not None:
        for line in lines:
            tell(line)
    rows = RowStream(documents, config.data, config.seed)
    num_steps = config.steps
    if num_steps is None:
        num_steps = max(1, rows.num_rows(config.epochs or 1) // config.batch_rows)
        config.optimizer.check_warmup(num_steps)
    return RunData(rows, documents, evaluation, num_steps)


def check_token_ids(sets: dict[str, Sequence[Document]], vocab_size: int, tokenizer: Tokenizer) -> None:
    """Raises DataError naming the largest token id that the base has no embedding for, and the set that uses it."""
    for role, documents in sets.items():
        largest = max((int(document.token_ids.max()) for document in documents if len(document)), default=0)
        if largest >= vocab_size:
            raise DataError(
                f"the {role} data uses the token {tokenizer.token_piece(largest)!r} with id {largest}, but the base's "
                f"vocabulary has {vocab_size} entries (vocab_size in config.json): tokens were added to its tokenizer "
                "alone; use the tokenizer that came with the base, or leave such tokens out of the data"
            )
