"""Where an adapter to be exported comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loaders.adapter import load_adapter
from loaders.adapter_types import ExpertLora
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.checkpoint import RUN_FILE, CheckpointProblem, read_factors
from runtime.trainer.config_file import as_flat, from_plain
from runtime.trainer.export.layouts import Experts, Linears
from runtime.trainer.gather import as_adapter
from runtime.trainer.targets import module_of, resolve_targets

MAX_LORA_RANK = 512
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(?:gate|up|down)_proj$")


@dataclass(frozen=True)
class AdapterSource:
    """The factors of an adapter in memory. `remarks`: what its reader left out or warns of.

    `idle`: (layer, expert) that the file has with an all-zero lora_B. `dtype`: what a run stores its adapter in, None
    for a file. `settings` and `metrics`: of the run, for the card.
    """

    linears: Linears
    experts: Experts
    base_name: str | None
    remarks: tuple[str, ...]
    idle: tuple[tuple[int, int], ...] = ()
    dtype: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def with_idle_experts(self) -> Experts:
        """The experts to write, those that the file has without effect too: PEFT wants every expert of a layer."""
        filled = {layer: dict(adapted) for layer, adapted in self.experts.items()}
        for layer, expert in self.idle:
            filled.setdefault(layer, {}).setdefault(expert, ExpertLora())
        return filled


def read_source(path: Path, base: DeepseekConfig) -> AdapterSource:
    """Read the adapter at `path`: a checkpoint of a training run, or an adapter in any layout that the loaders know.

    Raises AdapterError with every problem, CheckpointProblem, or ConfigError if the checkpoint is of another base.
    """
    if (path / RUN_FILE).is_file():
        return _read_checkpoint(path, base)
    targets = base.adapter_targets()
    weights = load_adapter(path, targets, max_lora_rank=MAX_LORA_RANK)
    base_name = weights.config.get("base_model_name_or_path")
    remarks = (*weights.warnings, *(f"{key}: {reason}" for key, reason in weights.skipped))
    idle = {(int(found[1]), int(found[2])) for key, _ in weights.skipped if (found := _EXPERT.match(key))}
    name = base_name if isinstance(base_name, str) else None
    return AdapterSource(weights.linears, weights.experts, name, remarks, tuple(sorted(idle)))


def _read_checkpoint(path: Path, base: DeepseekConfig) -> AdapterSource:
    state, factors = read_factors(path)
    config = from_plain(state.settings, str(path / RUN_FILE))
    specs = resolve_targets(base, config.lora, config.seed)
    scales = {name: specs[module].scale for name in factors if (module := module_of(name)) in specs}
    unknown = sorted(factors.keys() - scales.keys())
    if unknown:
        raise CheckpointProblem(f"{path} holds {unknown[0]}, which this base does not have: is it another base?")
    adapter = as_adapter(factors, scales)
    remark = f"a checkpoint after step {state.step}"
    return AdapterSource(
        adapter.linears,
        adapter.experts,
        config.called_base,
        (remark,),
        dtype=config.stored_dtype,
        settings=as_flat(config),
        metrics=state.metrics,
    )
