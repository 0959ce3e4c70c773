"""The adapter's folder that a run leaves behind, from the factors of all its processes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from runtime.distributed.mesh import Mesh
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.config import TrainConfig
from runtime.trainer.config_file import as_flat
from runtime.trainer.export.adapter_files import ADAPTER_DTYPES, ExportOptions, export_notes, write_adapter
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
    options = ExportOptions(config.export_format, ADAPTER_DTYPES[config.stored_dtype], config.called_base)
    try:
        notes = export_notes(adapter.linears, adapter.experts, targets, options)
        title = config.output.resolve().name
        card = model_card(as_flat(config), metrics, notes, name=title, base_name=options.base_name)
        num_bytes = write_adapter(path, adapter.linears, adapter.experts, targets, options, card)
    except (OSError, ValueError) as cause:
        return str(cause)
    logger.info("%s: %s in %s, %s bytes", path, config.export_format, config.stored_dtype, f"{num_bytes:,}")
    return None
