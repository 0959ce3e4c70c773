"""Layout 1: one 2-D pair per expert and projection, as PEFT on transformers v4, ms-swift and Megatron-Bridge write.

`model.layers.N.mlp.experts.K.gate_proj.lora_A.weight` [r, hidden], `.lora_B.weight` [intermediate, r]; up the same;
down [r, intermediate] and [hidden, r]. Experts and projections may be missing.
"""

import re
from collections.abc import MutableMapping

from torch import Tensor

from loaders.adapter_formats.base import AdapterBuilder, FormatContext, Projection, take
from loaders.adapter_formats.shapes import check_pair
from loaders.adapter_keys import FactorPair
from loaders.adapter_types import LoraPair

_MODULE = re.compile(r"^model\.layers\.(0|[1-9][0-9]*)\.mlp\.experts\.(0|[1-9][0-9]*)\.(gate|up|down)_proj$")
_PROJECTIONS: dict[str, Projection] = {"gate": "gate", "up": "up", "down": "down"}


class PerExpertFormat:
    """PEFT per-expert 2-D factors."""

    layout = "PEFT per-expert 2-D factors"

    def recognises(self, module: str) -> bool:
        """`...mlp.experts.K.{gate,up,down}_proj`."""
        return _MODULE.match(module) is not None

    def check(self, pairs: list[FactorPair], context: FormatContext) -> None:
        """The layer must have routed experts, the index must be in range, the shapes those of the base."""
        for pair in pairs:
            layer, expert, projection = self._parse(pair.module)
            shape = context.targets.experts.get(layer)
            if shape is None:
                context.problems.append(f"{pair.module}: layer {layer} of the base has no routed experts")
            elif expert >= shape.num_experts:
                context.problems.append(
                    f"{pair.module}: the base has {shape.num_experts} experts (0 to {shape.num_experts - 1}); "
                    "trained on a base with more?"
                )
            elif projection == "down":
                check_pair(pair, shape.hidden, shape.intermediate, shape.hidden, context)
            else:
                check_pair(pair, shape.intermediate, shape.hidden, shape.hidden, context)

    def build(
        self, pair: FactorPair, tensors: MutableMapping[str, Tensor], context: FormatContext, builder: AdapterBuilder
    ) -> None:
        """The factors are taken as they are; an all-zero lora_B changes nothing and is left out."""
        layer, expert, projection = self._parse(pair.module)
        a, b = take(pair, tensors)
        if not bool(b.any()):
            builder.skipped.append((pair.module, "lora_B is all zero, no effect"))
            return
        name = context.rules.name_in_patterns(pair.module)
        builder.add_expert(layer, expert, projection, LoraPair(a, b, context.rules.scale(name, a.shape[0])))

    @staticmethod
    def _parse(module: str) -> tuple[int, int, Projection]:
        match = _MODULE.match(module)
        if match is None:
            raise ValueError(f"{module} is not a per-expert module")
        return int(match[1]), int(match[2]), _PROJECTIONS[match[3]]
