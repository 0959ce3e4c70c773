"""Where an adapter to be exported comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loaders.adapter import load_adapter
from loaders.adapter_types import AdapterTargets
from runtime.trainer.export.layouts import Experts, Linears

MAX_LORA_RANK = 512


@dataclass(frozen=True)
class AdapterSource:
    """The factors of an adapter in memory. `remarks`: what its reader left out or warns of."""

    linears: Linears
    experts: Experts
    base_name: str | None
    remarks: tuple[str, ...]


def read_source(path: Path, targets: AdapterTargets) -> AdapterSource:
    """Read the adapter at `path`: an adapter folder in any layout that the loaders know.

    Other kinds of folders are told apart here. Raises AdapterError with every problem.
    """
    weights = load_adapter(path, targets, max_lora_rank=MAX_LORA_RANK)
    base_name = weights.config.get("base_model_name_or_path")
    remarks = (*weights.warnings, *(f"{key}: {reason}" for key, reason in weights.skipped))
    return AdapterSource(weights.linears, weights.experts, base_name if isinstance(base_name, str) else None, remarks)
