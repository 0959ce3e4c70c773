"""3-D stacks with a projection's name: SGLang's and Tinker's.

SGLang: `...mlp.experts.gate_proj.lora_A.weight` [E or 1, r, in], `.lora_B.weight` [E or 1, out, r], also up_proj,
down_proj and gate_up_proj; of the last, A holds either r rows for both halves or 2r, first gate's and then up's.
Tinker: the same under w1 (gate), w3 (up) and w2 (down). A leading 1 is one factor for all experts.
"""

import re
from collections.abc import Mapping, MutableMapping
from typing import Literal

from torch import Tensor

from loaders.adapter_formats.base import AdapterBuilder, FormatContext, Projection, take
from loaders.adapter_formats.per_expert import MIXTRAL_PROJECTIONS, PEFT_PROJECTIONS
from loaders.adapter_formats.stacks import add_gate_up, add_stack, expert_shape, mismatch, report_idle
from loaders.adapter_keys import FactorPair
from loaders.adapter_types import ExpertShape

Part = Projection | Literal["gate_up"]
SGLANG_PARTS: dict[str, Part] = {**PEFT_PROJECTIONS, "gate_up_proj": "gate_up"}
TINKER_PARTS: dict[str, Part] = {**MIXTRAL_PROJECTIONS}


class ExpertStackFormat:
    """A [E or 1, r, in] and B [E or 1, out, r] of one projection of a layer's experts."""

    def __init__(self, layout: str, parts: Mapping[str, Part]) -> None:
        self.layout = layout
        self._parts = parts
        self._module = re.compile(rf"^model\.layers\.(0|[1-9][0-9]*)\.mlp\.experts\.({'|'.join(parts)})$")

    def recognises(self, pair: FactorPair) -> bool:
        """`...mlp.experts.{gate,up,down,gate_up}_proj` or `...mlp.experts.w{1,2,3}`."""
        return self._module.match(pair.module) is not None

    def check(self, pairs: list[FactorPair], context: FormatContext) -> None:
        """Leading axes of 1 or the number of experts, the rest as of a plain pair."""
        num_shared = 0
        for pair in pairs:
            layer, part = self._parse(pair.module)
            shape = expert_shape(pair, layer, context)
            if shape is None:
                continue
            if not self._fits(pair, part, shape):
                context.problems.append(self._mismatch(pair, part, shape))
                continue
            num_shared += shape.num_experts > 1 and 1 in (pair.a_shape[0], pair.b_shape[0])
            name = context.rules.name_in_patterns(pair.module)
            context.check_rank(pair.module, name, pair.b_shape[2])
        shared = f", {num_shared} with a factor for all experts" if num_shared else ""
        names = f"mlp.experts.{{{','.join(self._parts)}}}"
        context.evidence.append(f"keys {names}: {len(pairs)} 3-D pairs{shared}")

    def build(
        self, pair: FactorPair, tensors: MutableMapping[str, Tensor], context: FormatContext, builder: AdapterBuilder
    ) -> None:
        """Split the stacks; experts whose factors have no effect are left out."""
        layer, part = self._parse(pair.module)
        num = context.targets.experts[layer].num_experts
        a, b = take(pair, tensors)
        lora_rank = b.shape[2]
        scale = context.rules.scale(context.rules.name_in_patterns(pair.module), lora_rank)
        if part != "gate_up":
            num_idle = add_stack(builder, layer, part, (a, b), scale, num)
        elif a.shape[1] == lora_rank:
            _, num_idle = add_gate_up(builder, layer, (a, b), scale, num)
        else:
            (a_gate, a_up), (b_gate, b_up) = a.split(lora_rank, dim=1), b.chunk(2, dim=1)
            num_idle = min(
                add_stack(builder, layer, "gate", (a_gate, b_gate), scale, num),
                add_stack(builder, layer, "up", (a_up, b_up), scale, num),
            )
        report_idle(builder, pair.module, num_idle, num)

    @staticmethod
    def _fits(pair: FactorPair, part: Part, shape: ExpertShape) -> bool:
        if len(pair.a_shape) != 3 or len(pair.b_shape) != 3:
            return False
        (num_a, rows, num_in), (num_b, num_out, lora_rank) = pair.a_shape, pair.b_shape
        if not {num_a, num_b} <= {1, shape.num_experts} or lora_rank == 0:
            return False
        if rows != lora_rank and (part != "gate_up" or rows != 2 * lora_rank):
            return False
        return (num_out, num_in) == _dims(part, shape)

    @staticmethod
    def _mismatch(pair: FactorPair, part: Part, shape: ExpertShape) -> str:
        num_out, num_in = _dims(part, shape)
        lead = f"{shape.num_experts} or 1"
        rows = "r or 2r" if part == "gate_up" else "r"
        axis, found = (-2, pair.b_shape) if part == "down" else (-1, pair.a_shape)
        hidden = (found[axis], shape.hidden) if len(found) == 3 else None
        return mismatch(pair, f"[{lead}, {rows}, {num_in}] and [{lead}, {num_out}, r] for this base", hidden)

    def _parse(self, module: str) -> tuple[int, Part]:
        match = self._module.match(module)
        if match is None:
            raise ValueError(f"{module} is not a stack of experts")
        return int(match[1]), self._parts[match[2]]


def _dims(part: Part, shape: ExpertShape) -> tuple[int, int]:
    """(out, in) of one expert's part."""
    return (2 * shape.intermediate, shape.hidden) if part == "gate_up" else shape.dims(part)
