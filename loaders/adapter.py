"""LoRA adapters: recognise the layout, check every key against the base, and convert to plain factors."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from loaders.adapter_config import read_rules
from loaders.adapter_folder import AdapterFolder
from loaders.adapter_formats import FORMATS, WRITERS, AdapterBuilder, AdapterFormat, FormatContext
from loaders.adapter_formats.param_wrapper import ParamWrapperFormat
from loaders.adapter_keys import FactorPair, SortedKeys, sort_keys
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
from loaders.errors import AdapterError
from loaders.family import explain_other_base
from loaders.finite import non_finite
from loaders.zeros import is_zero

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

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
        keys = sort_keys(folder.tensors, targets)
        problems = keys.problems
        rules = read_rules(folder.config, problems)
        context = FormatContext(
            targets, rules, max_lora_rank, writer, folder.is_unsloth_card(), folder.b_order_note, problems
        )
        problems.extend(explain_other_base(folder.config, targets))
        plan = _plan(keys, context)
        _refuse(folder.path, context.problems)
        wanted = {tensor.stored.name for pair in keys.pairs for tensor in (pair.a, pair.b)}
        if on_checked is not None:
            on_checked(sum(math.prod(t.stored.shape) for t in folder.tensors if t.stored.name in wanted))
        tensors = folder.read(wanted)

    context.problems.extend(non_finite(tensors))
    _refuse(folder.path, context.problems)
    without_effect = all(is_zero(tensors[pair.b.stored.name]) for pair in keys.pairs)
    builder = AdapterBuilder()
    for adapter_format, pairs in plan:
        for pair in pairs:
            adapter_format.build(pair, tensors, context, builder)
    _refuse(folder.path, context.problems)
    experts = {layer: dict(sorted(own.items())) for layer, own in sorted(builder.experts.items())}
    return AdapterWeights(
        linears=builder.linears,
        experts=experts,
        digest=folder.digest,
        config=folder.config,
        layout=" + ".join(adapter_format.layout for adapter_format, _ in plan),
        skipped=(*folder.skipped, *keys.skipped, *builder.skipped),
        num_bytes=num_kept_bytes(builder.linears, experts),
        warnings=_warnings(context, without_effect),
        evidence=tuple(context.evidence),
    )


def _plan(keys: SortedKeys, context: FormatContext) -> list[tuple[AdapterFormat, list[FactorPair]]]:
    """Give every pair to the first format that recognises it, and let each format check its own."""
    groups: dict[int, list[FactorPair]] = {}
    for pair in keys.pairs:
        number = next(n for n, adapter_format in enumerate(FORMATS) if adapter_format.recognises(pair))
        groups.setdefault(number, []).append(pair)
        for tensor in (pair.a, pair.b):
            if tensor.stored.dtype not in _DTYPES:
                context.problems.append(
                    f"{tensor.stored.name}: stored as {tensor.stored.dtype_name}, only F32, F16 and BF16 are supported"
                )
    plan = [(FORMATS[number], pairs) for number, pairs in sorted(groups.items())]
    for adapter_format, pairs in plan:
        adapter_format.check(pairs, context)
    expert_layouts = [adapter_format.layout for adapter_format, _ in plan if adapter_format is not FORMATS[-1]]
    if len(expert_layouts) > 1:
        context.problems.append(f"experts in two layouts at once: {' and '.join(expert_layouts)}")
    if context.writer and not any(isinstance(adapter_format, ParamWrapperFormat) for adapter_format, _ in plan):
        context.problems.append(
            f"--format-hint {context.writer} has no effect: the file has no flat stacks of experts (mlp.experts.lora_A)"
        )
    if not keys.pairs and not context.problems:
        context.problems.append("no LoRA factors in the files")
    return plan


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        raise AdapterError(f"{path}: adapter refused, {len(problems)} {noun}", problems)


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
