"""What an adapter's headers and configuration say before any weight is read: what every tensor means, or a refusal.

Adapters that were trained alike say the same, so the last few plans are remembered. Refusals never are.
"""

import math
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from loaders.adapter_config import read_rules
from loaders.adapter_folder import AdapterFolder
from loaders.adapter_formats import FORMATS, AdapterFormat, FormatContext
from loaders.adapter_formats.param_wrapper import ParamWrapperFormat
from loaders.adapter_keys import FactorPair, SortedKeys, sort_keys
from loaders.adapter_types import AdapterTargets
from loaders.errors import AdapterError
from loaders.family import explain_other_base
from loaders.tensor_runs import Run

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_REMEMBERED_BYTES = 2**20  # of headers and configuration; with its plan, one takes some three times as much


@dataclass(frozen=True)
class AdapterPlan:
    """Pairs by the layout that builds them, keys without use and why, and for each file what is read in one go.

    `num_elements` counts the numbers of all factors. It must not be changed: other loads share it.
    """

    steps: Sequence[tuple[AdapterFormat, Sequence[FactorPair]]]
    skipped: Sequence[tuple[str, str]]
    runs: Sequence[Sequence[Run]]
    num_elements: int
    checked: FormatContext

    def new_context(self, targets: AdapterTargets, zeros: Set[str]) -> FormatContext:
        """What the checks found, `zeros` of the files of one load, and room for its problems."""
        return replace(self.checked, targets=targets, zeros=zeros, problems=[])


def plan_adapter(folder: AdapterFolder, targets: AdapterTargets, max_lora_rank: int, writer: str | None) -> AdapterPlan:
    """Give every key its meaning; raises AdapterError with every problem by name."""
    is_unsloth_card = folder.is_unsloth_card()
    said = (folder.headers, folder.config_bytes, is_unsloth_card)  # metadata, and so the order of B, is in the headers
    base = (*targets.linears.items(), *targets.experts.items(), targets.num_hidden_layers, targets.model_type)
    num_bytes = len(folder.config_bytes) + sum(map(len, folder.headers))
    plans = _accepted((said, base, max_lora_rank, writer)) if num_bytes <= _MAX_REMEMBERED_BYTES else []
    if not plans:
        problems: list[str] = []
        rules = read_rules(folder.config, problems)
        context = FormatContext(targets, rules, max_lora_rank, writer, is_unsloth_card, folder.b_order_note, problems)
        plans.append(_checked_plan(folder, context))
    return plans[0]


@lru_cache(maxsize=4)
def _accepted(everything_it_follows_from: Hashable) -> list[AdapterPlan]:
    """Where the plan of adapters that say this is kept, once it is made."""
    return []


def _checked_plan(folder: AdapterFolder, context: FormatContext) -> AdapterPlan:
    keys = sort_keys(folder.tensors, context.targets)
    context.problems[:0] = keys.problems
    context.problems.extend(explain_other_base(folder.config, context.targets))
    steps = _steps(keys, context)
    refuse(folder.path, context.problems)
    wanted = {tensor.name for pair in keys.pairs for tensor in (pair.a, pair.b)}
    num_elements = sum(math.prod(tensor.shape) for tensor in folder.tensors if tensor.name in wanted)
    return AdapterPlan(steps, keys.skipped, folder.runs(wanted), num_elements, context)


def _steps(keys: SortedKeys, context: FormatContext) -> list[tuple[AdapterFormat, list[FactorPair]]]:
    """Give every pair to the first format that recognises it, and let each format check its own."""
    groups: dict[int, list[FactorPair]] = {}
    for pair in keys.pairs:
        number = next(n for n, adapter_format in enumerate(FORMATS) if adapter_format.recognises(pair))
        groups.setdefault(number, []).append(pair)
        for tensor in (pair.a, pair.b):
            if tensor.dtype not in _DTYPES:
                context.problems.append(
                    f"{tensor.name}: stored as {tensor.dtype_name}, only F32, F16 and BF16 are supported"
                )
    steps = [(FORMATS[number], pairs) for number, pairs in sorted(groups.items())]
    for adapter_format, pairs in steps:
        adapter_format.check(pairs, context)
    expert_layouts = [adapter_format.layout for adapter_format, _ in steps if adapter_format is not FORMATS[-1]]
    if len(expert_layouts) > 1:
        context.problems.append(f"experts in two layouts at once: {' and '.join(expert_layouts)}")
    if context.writer and not any(isinstance(adapter_format, ParamWrapperFormat) for adapter_format, _ in steps):
        context.problems.append(
            f"--format-hint {context.writer} has no effect: the file has no flat stacks of experts (mlp.experts.lora_A)"
        )
    if not keys.pairs and not context.problems:
        context.problems.append("no LoRA factors in the files")
    return steps


def refuse(path: Path, problems: Sequence[str]) -> None:
    """Raise AdapterError with the problems, if there are any."""
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        raise AdapterError(f"{path}: adapter refused, {len(problems)} {noun}", problems)
