"""The adapter's folder that a run leaves behind, from the factors of all its processes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from runtime.distributed.mesh import Mesh
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.config import TrainConfig
from runtime.trainer.config_file import as_plain
from runtime.trainer.export.adapter_files import ExportOptions, export_notes, write_adapter
from runtime.trainer.export.card import model_card
from runtime.trainer.gather import gather_adapter
from runtime.trainer.model import TrainedModel

logger = logging.getLogger(__name__)


def write_result(
    config: TrainConfig,
    base: DeepseekConfig,
    model: TrainedModel,
    mesh: Mesh,
    metrics: Mapping[str, float],
    name: str,
) -> str | None:
    """Gather the adapter and write it to `output`/name; the problem in words if that failed."""
    adapter = gather_adapter(model.parameters, mesh)
    if adapter is None:
        return None
    path: Path = config.output / name
    targets = base.adapter_targets()
    options = ExportOptions(config.export_format, torch.bfloat16, config.called_base)
    try:
        notes = export_notes(adapter.linears, adapter.experts, targets, options)
        title = config.output.resolve().name
        card = model_card(_settings(config), metrics, notes, name=title, base_name=options.base_name)
        num_bytes = write_adapter(path, adapter.linears, adapter.experts, targets, options, card)
    except (OSError, ValueError) as cause:
        return str(cause)
    logger.info("%s: %s, %s bytes", path, config.export_format, f"{num_bytes:,}")
    return None


def _settings(config: TrainConfig) -> dict[str, str]:
    """The run's settings, flat."""

    def flat(prefix: str, value: object) -> dict[str, str]:
        if not isinstance(value, dict):
            return {prefix: str(value)}
        return {key: text for name, item in value.items() for key, text in flat(f"{prefix}.{name}", item).items()}

    return {key.removeprefix("."): text for key, text in flat("", as_plain(config)).items()}
