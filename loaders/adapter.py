"""LoRA adapters: recognise the layout, check every key against the base, and convert to plain factors."""

from collections.abc import Callable
from pathlib import Path

from loaders.adapter_folder import AdapterFolder
from loaders.adapter_formats import WRITERS, AdapterBuilder, FormatContext
from loaders.adapter_plan import plan_adapter, refuse
from loaders.adapter_report import describe
from loaders.adapter_types import (
    AdapterTargets,
    AdapterWeights,
    ExpertLora,
    ExpertShape,
    LoraPair,
    ReplacementExperts,
    num_kept_bytes,
)

__all__ = [
    "WRITERS",
    "AdapterTargets",
    "AdapterWeights",
    "ExpertLora",
    "ExpertShape",
    "LoraPair",
    "ReplacementExperts",
    "describe",
    "load_adapter",
]


def load_adapter(
    path: Path,
    targets: AdapterTargets,
    *,
    max_lora_rank: int = 128,
    max_bytes: int | None = None,
    writer: str | None = None,
    on_checked: Callable[[int], None] | None = None,
) -> AdapterWeights:
    """Load the adapter directory `path` for a base that offers `targets`; factors are on CPU in their stored dtype.

    Names, shapes and settings are checked from the headers before any weight is read. Raises AdapterError with every
    problem by name: each key is used, listed in `skipped` with its reason, or the whole load is refused. `writer`, one
    of WRITERS, says who wrote flat stacks of experts that may be of several writers. `on_checked` hears how many
    numbers the factors have, once the headers are known to be fine.
    """
    with AdapterFolder(path, max_bytes) as folder:
        plan = plan_adapter(folder, targets, max_lora_rank, writer)
        if on_checked is not None:
            on_checked(plan.num_elements)
        contents = folder.read(plan.runs)

    refuse(folder.path, contents.problems)
    context = plan.new_context(targets, contents.zeros)
    without_effect = all(pair.b.name in contents.zeros for _, pairs in plan.steps for pair in pairs)
    builder = AdapterBuilder()
    for adapter_format, pairs in plan.steps:
        for pair in pairs:
            adapter_format.build(pair, contents.tensors, context, builder)
    refuse(folder.path, context.problems)
    experts = builder.experts()
    return AdapterWeights(
        linears=builder.linears,
        experts=experts,
        hashed=lambda: folder.digest,
        config=folder.config,
        layout=" + ".join(adapter_format.layout for adapter_format, _ in plan.steps),
        skipped=(*folder.skipped, *plan.skipped, *builder.skipped),
        num_bytes=num_kept_bytes(builder.linears, experts),
        warnings=_warnings(context, without_effect),
        evidence=tuple(context.evidence),
    )


def _warnings(context: FormatContext, is_zero: bool) -> tuple[str, ...]:
    warnings = list(context.warnings)
    if is_zero:
        warnings.append("every lora_B is zero: the adapter has no effect (saved before training?)")
    if context.rank_differences:
        num = len(context.rank_differences)
        warnings.append(
            f"{num} modules have another rank than r = {context.rules.lora_rank:g} of adapter_config.json, e.g. "
            f"{context.rank_differences[0]}; ranks and scales are taken from the tensors"
        )
    return tuple(warnings)
