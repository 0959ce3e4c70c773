"""SGLang's shared-outer layout: of each pair one factor is per expert, the other one is shared by all experts.

`...mlp.experts.gate_proj.lora_A.weight` [1, r, in] with `...mlp.experts.K.gate_proj.lora_B.weight` [out, r]; of
down_proj it is lora_B [1, out, r] that is shared. Nothing in adapter_config.json says so.
"""

import re
from collections.abc import MutableMapping

from torch import Tensor

from loaders.adapter_formats.base import AdapterBuilder, FormatContext, Projection, take
from loaders.adapter_formats.per_expert import PEFT_PROJECTIONS
from loaders.adapter_formats.shapes import check_expert
from loaders.adapter_formats.stacks import expert_shape, mismatch
from loaders.adapter_keys import FactorPair
from loaders.adapter_types import LoraPair

_MODULE = re.compile(
    r"^model\.layers\.(0|[1-9][0-9]*)\.mlp\.experts\.(0|[1-9][0-9]*)\.(gate_proj|up_proj|down_proj)$"
)


class SharedOuterFormat:
    """Pairs of which one factor is shared by the experts of a layer."""

    layout = "SGLang shared-outer factors"

    def recognises(self, pair: FactorPair) -> bool:
        """A per-expert module of which one side stands under the name without the expert's index."""
        return pair.shared is not None and _MODULE.match(pair.module) is not None

    def check(self, pairs: list[FactorPair], context: FormatContext) -> None:
        """The shared factor has a leading 1; the rest is that of a plain pair."""
        for pair in pairs:
            layer, expert, projection = _parse(pair.module)
            shape = expert_shape(pair, layer, context)
            if shape is None or not check_expert(pair.module, expert, shape, context):
                continue
            num_out, num_in = shape.dims(projection)
            a_lead, b_lead = ((1,), ()) if pair.shared == "A" else ((), (1,))
            lora_rank = pair.b_shape[-1] if pair.b_shape else 0
            expected = ((*a_lead, lora_rank, num_in), (*b_lead, num_out, lora_rank))
            if lora_rank == 0 or (pair.a_shape, pair.b_shape) != expected:
                forms = f"{[*a_lead, 'r', num_in]} and {[*b_lead, num_out, 'r']}".replace("'", "")
                context.problems.append(mismatch(pair, f"{forms} for this base"))
                continue
            context.check_rank(pair.module, context.rules.name_in_patterns(pair.module), lora_rank)
        sides = " and ".join(sorted({f"lora_{pair.shared}" for pair in pairs}))
        context.evidence.append(f"{sides} without an expert's index beside per-expert factors")

    def build(
        self, pair: FactorPair, tensors: MutableMapping[str, Tensor], context: FormatContext, builder: AdapterBuilder
    ) -> None:
        """The shared factor stays one tensor."""
        layer, expert, projection = _parse(pair.module)
        a, b = take(pair, tensors)
        if {pair.a.name, pair.b.name} & context.zeros:
            builder.skipped.append((pair.module, "a factor is all zero, no effect"))
            return
        a, b = (a.squeeze(0), b) if pair.shared == "A" else (a, b.squeeze(0))
        name = context.rules.name_in_patterns(pair.module)
        scale = context.rules.scale(name, b.shape[1])
        shared = builder.shared_factor(layer, projection, a if pair.shared == "A" else b)
        a, b = (shared, b) if pair.shared == "A" else (a, shared)
        builder.add_expert(
            layer, expert, projection, LoraPair(a, b, scale, pair.shared == "A", pair.shared == "B")
        )


def _parse(module: str) -> tuple[int, int, Projection]:
    match = _MODULE.match(module)
    if match is None:
        raise ValueError(f"{module} is not a per-expert module")
    return int(match[1]), int(match[2]), PEFT_PROJECTIONS[match[3]]
