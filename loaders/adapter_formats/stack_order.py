"""Which of the writers that share ParamWrapper's keys wrote a file: they order the same numbers differently.

Evidence, strongest first: the shapes (in and out swapped or not), the user's `--format-hint`, `lora_B_layout` and then
`peft_version` in adapter_config.json. A file that may come from two writers is refused, never guessed.
"""

import re
from collections.abc import Iterable

from loaders.adapter_formats.base import FormatContext, StackOrder

_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.|$|[a-z])")
_FIRST_UNSWAPPED = (0, 19)
_MARKERS = ("rank_major", "grouped_by_expert")


WRITERS = {
    "peft": StackOrder(is_swapped=False, is_expert_major=False),
    "peft-0.18": StackOrder(is_swapped=True, is_expert_major=False),
    "unsloth": StackOrder(is_swapped=False, is_expert_major=True),
    "megatron-bridge": StackOrder(is_swapped=True, is_expert_major=True),
}


def decide_order(fits: Iterable[frozenset[bool]], is_order_free: bool, context: FormatContext) -> StackOrder | None:
    """The order of a file's stacks; None with a problem where evidence is missing or contradicts itself.

    `fits` holds for each stack whether its shapes fit unswapped (False), swapped (True) or both; `is_order_free` says
    that all stacks have one expert or rank 1, so that both orders of columns are the same.
    """
    shapes = frozenset({False, True}).intersection(*fits)
    if not shapes:
        context.problems.append("some stacks of experts have in and out swapped and others have not")
        return None
    by_shape = {name: order for name, order in WRITERS.items() if order.is_swapped in shapes}
    shape_words = {1: "in and out are swapped" if True in shapes else "in and out are the base's", 2: "fits both ways"}
    context.evidence.append(f"shapes of the stacks: {shape_words[len(shapes)]}")
    possible = _by_hint(by_shape, context) if context.writer else _by_config(by_shape, context)
    orders = set(possible.values())
    if is_order_free and len({order.is_swapped for order in orders}) == 1:
        orders = {min(orders, key=lambda order: order.is_expert_major)}
    if len(orders) == 1:
        return orders.pop()
    if orders:
        context.problems.append(_ambiguous(possible, context))
    return None


def _by_hint(by_shape: dict[str, StackOrder], context: FormatContext) -> dict[str, StackOrder]:
    writer = context.writer or ""
    marker = context.rules.raw.get("lora_B_layout")
    if writer not in by_shape:
        context.problems.append(
            f"--format-hint {writer} does not fit the shapes of the stacks, which are those of {' or '.join(by_shape)}"
        )
    elif marker in _MARKERS and WRITERS[writer].is_expert_major != (marker == "grouped_by_expert"):
        context.problems.append(f"--format-hint {writer} contradicts lora_B_layout {marker!r} in adapter_config.json")
    else:
        context.evidence.append(f"written by {writer}, as --format-hint says")
        return {writer: WRITERS[writer]}
    return {}


def _by_config(possible: dict[str, StackOrder], context: FormatContext) -> dict[str, StackOrder]:
    """Narrow the writers down by adapter_config.json; what contradicts the shapes is a problem."""
    config = context.rules.raw
    marker, version = config.get("lora_B_layout"), config.get("peft_version")
    if marker is None and context.b_order_note is not None:
        marker = context.b_order_note
        context.evidence.append(f"{marker} in the metadata of the safetensors file")
    elif marker is not None and marker not in _MARKERS:
        context.problems.append(
            f"adapter_config.json: lora_B_layout {str(marker)[:40]!r} is not one of {', '.join(_MARKERS)}"
        )
        return {}
    elif marker is not None:
        context.evidence.append(f"lora_B_layout {marker} in adapter_config.json")
    if marker is not None:
        is_expert_major = marker == "grouped_by_expert"
        possible = {name: order for name, order in possible.items() if order.is_expert_major == is_expert_major}
    version = version[:20] if isinstance(version, str) else ""
    match = _VERSION.match(version)
    if match is None or (marker is None and _is_from_unsloth(context)):
        return possible
    is_swapped = (int(match[1]), int(match[2])) < _FIRST_UNSWAPPED
    if is_swapped not in {order.is_swapped for order in possible.values()}:
        context.problems.append(
            f"adapter_config.json: peft_version {version!r} wrote stacks with in and out "
            f"{'swapped' if is_swapped else 'as in the base'}, these are the other way round; if you know what wrote "
            f"them, convert them with `graft convert --format-hint {{{','.join(possible)}}}`"
        )
        return {}
    context.evidence.append(f"peft_version {version} in adapter_config.json")
    return {
        name: order
        for name, order in possible.items()
        if order.is_swapped == is_swapped and (marker is not None or not order.is_expert_major)
    }


def _is_from_unsloth(context: FormatContext) -> bool:
    """Whether anything in the folder names Unsloth, which also states the version of PEFT that it builds on."""
    auto_mapping = context.rules.raw.get("auto_mapping")
    base = context.rules.raw.get("base_model_name_or_path")
    is_fixed = isinstance(auto_mapping, dict) and bool(auto_mapping.get("unsloth_fixed"))
    return is_fixed or context.is_unsloth_card or (isinstance(base, str) and base.lower().startswith("unsloth/"))


def _ambiguous(possible: dict[str, StackOrder], context: FormatContext) -> str:
    if _is_from_unsloth(context):
        why = "the folder names Unsloth but not lora_B_layout, so the order of lora_B's columns is unknown"
    else:
        why = "neither lora_B_layout nor peft_version in adapter_config.json says who wrote the stacks of experts"
    options = ",".join(possible)
    return f"{why}; say it with `graft convert --format-hint {{{options}}}`: a wrong answer gives wrong outputs"
