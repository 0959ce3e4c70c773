"""NeMo Automodel's own layout of grouped experts: 3-D and transposed, for x @ A @ B.

`...mlp.experts.lora_gate_and_up_A` [E, H, r], `lora_gate_and_up_B` [E, r, 2I] (gate, then up), `lora_down_A` [E, I, r],
`lora_down_B` [E, r, H].
"""

import re
from collections.abc import MutableMapping

from torch import Tensor

from loaders.adapter_formats.base import AdapterBuilder, FormatContext, take
from loaders.adapter_formats.stacks import add_gate_up, add_stack, expert_shape, mismatch, report_idle
from loaders.adapter_keys import FactorPair
from loaders.adapter_types import ExpertShape

_MODULE = re.compile(r"^model\.layers\.(0|[1-9][0-9]*)\.mlp\.experts\.lora_(gate_and_up|down)$")


class AutomodelFormat:
    """Grouped experts as NeMo Automodel keeps them in memory and saves them by default."""

    layout = "NeMo Automodel grouped experts"

    def recognises(self, pair: FactorPair) -> bool:
        """`...mlp.experts.lora_gate_and_up` and `...mlp.experts.lora_down`."""
        return _MODULE.match(pair.module) is not None

    def check(self, pairs: list[FactorPair], context: FormatContext) -> None:
        """Every expert of the layer, in and out as the base's, one rank."""
        context.evidence.append("keys mlp.experts.lora_{gate_and_up,down}_{A,B} with transposed 3-D factors")
        for pair in pairs:
            layer, is_down = _parse(pair.module)
            shape = expert_shape(pair, layer, context)
            if shape is None:
                continue
            num_in, num_out = _dims(is_down, shape)
            lora_rank = pair.a_shape[-1] if pair.a_shape else 0
            num = shape.num_experts
            if lora_rank == 0 or (pair.a_shape, pair.b_shape) != ((num, num_in, lora_rank), (num, lora_rank, num_out)):
                axis, found = (-1, pair.b_shape) if is_down else (-2, pair.a_shape)
                hidden = (found[axis], shape.hidden) if len(found) == 3 else None
                expected = f"[{num}, {num_in}, r] and [{num}, r, {num_out}] for this base"
                context.problems.append(mismatch(pair, expected, hidden))
                continue
            # A block-diagonal gate and up is two adapters of half the rank; `build` checks again once it can see B.
            limit = context.max_lora_rank * (1 if is_down else 2)
            context.check_rank(pair.module, pair.module, lora_rank, limit)

    def build(
        self, pair: FactorPair, tensors: MutableMapping[str, Tensor], context: FormatContext, builder: AdapterBuilder
    ) -> None:
        """Turn the factors to [r, in] and [out, r] and split them into experts."""
        layer, is_down = _parse(pair.module)
        num = context.targets.experts[layer].num_experts
        stored = list(take(pair, tensors))
        b = stored.pop().transpose(1, 2).contiguous()
        a = stored.pop().transpose(1, 2).contiguous()
        scale = context.rules.scale(pair.module, a.shape[1])
        if is_down:
            num_idle = add_stack(builder, layer, "down", (a, b), scale, num)
        else:
            lora_rank, num_idle = add_gate_up(builder, layer, (a, b), scale, num)
            context.check_split(pair.module, lora_rank)
        report_idle(builder, pair.module, num_idle, num)


def _parse(module: str) -> tuple[int, bool]:
    match = _MODULE.match(module)
    if match is None:
        raise ValueError(f"{module} is not a group of experts")
    return int(match[1]), match[2] == "down"


def _dims(is_down: bool, shape: ExpertShape) -> tuple[int, int]:
    """(in, out) of one expert's part."""
    return (shape.intermediate, shape.hidden) if is_down else (shape.hidden, 2 * shape.intermediate)
