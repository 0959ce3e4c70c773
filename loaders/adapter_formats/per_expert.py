"""One 2-D pair per expert and projection, in PEFT's names and in Mixtral's.

`model.layers.N.mlp.experts.K.gate_proj.lora_A.weight` [r, hidden], `.lora_B.weight` [intermediate, r]; up the same;
down [r, intermediate] and [hidden, r]. Experts and projections may be missing. PEFT on transformers v4, ms-swift and
Megatron-Bridge write it. Mixtral's names (`block_sparse_moe`, w1 gate, w2 down, w3 up) say the same.
"""

import re
from collections.abc import Mapping, MutableMapping
from functools import lru_cache

from torch import Tensor

from loaders.adapter_explain import no_experts
from loaders.adapter_formats.base import AdapterBuilder, FormatContext, Projection, take
from loaders.adapter_formats.shapes import check_expert, check_pair
from loaders.adapter_keys import FactorPair
from loaders.adapter_types import LoraPair

PEFT_PROJECTIONS: dict[str, Projection] = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
MIXTRAL_PROJECTIONS: dict[str, Projection] = {"w1": "gate", "w2": "down", "w3": "up"}


class PerExpertFormat:
    """2-D factors of single experts; `names` are those of the projections, `block` that of the MoE module."""

    def __init__(self, layout: str, block: str, names: Mapping[str, Projection]) -> None:
        self.layout = layout
        self._names = names
        self._key = f"{block}.experts.K.{{{','.join(names)}}}"
        number = "(0|[1-9][0-9]*)"
        self._parse = lru_cache(maxsize=2**16)(self._parse_name)  # adapters of one base have the same names
        self._module = re.compile(rf"^model\.layers\.{number}\.{block}\.experts\.{number}\.({'|'.join(names)})$")

    def recognises(self, pair: FactorPair) -> bool:
        """`...mlp.experts.K.{gate,up,down}_proj`."""
        return pair.shared is None and self._module.match(pair.module) is not None

    def check(self, pairs: list[FactorPair], context: FormatContext) -> None:
        """The layer must have routed experts, the index must be in range, the shapes those of the base."""
        context.evidence.append(f"keys {self._key} with a 2-D pair each")
        for pair in pairs:
            layer, expert, projection = self._parse(pair.module)
            shape = context.targets.experts.get(layer)
            if shape is None:
                context.problems.append(no_experts(pair.module, layer))
            elif check_expert(pair.module, expert, shape, context):
                dims = shape.dims(projection)
                check_pair(pair, *dims, shape.hidden, context)

    def build(
        self, pair: FactorPair, tensors: MutableMapping[str, Tensor], context: FormatContext, builder: AdapterBuilder
    ) -> None:
        """The factors are taken as they are; an all-zero lora_B changes nothing and is left out."""
        layer, expert, projection = self._parse(pair.module)
        a, b = take(pair, tensors)
        if pair.b.name in context.zeros:
            builder.skipped.append((pair.module, "lora_B is all zero, no effect"))
            return
        name = context.rules.name_in_patterns(pair.module)
        builder.add_expert(layer, expert, projection, LoraPair(a, b, context.rules.scale(name, pair.a_shape[0])))

    def _parse_name(self, module: str) -> tuple[int, int, Projection]:
        match = self._module.match(module)
        if match is None:
            raise ValueError(f"{module} is not a per-expert module")
        return int(match[1]), int(match[2]), self._names[match[3]]
