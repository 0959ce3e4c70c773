"""Ordinary linear modules (attention, dense and shared MLP, lm_head): lora_A [r, in], lora_B [out, r]."""

from collections.abc import MutableMapping

from torch import Tensor

from loaders.adapter_explain import explain_unknown
from loaders.adapter_formats.base import AdapterBuilder, FormatContext, take
from loaders.adapter_formats.shapes import check_pair
from loaders.adapter_keys import FactorPair
from loaders.adapter_types import LoraPair

_IN_IS_HIDDEN = ("q_proj", "q_a_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj", "lm_head")
_OUT_IS_HIDDEN = ("o_proj", "down_proj")


class LinearFormat:
    """PEFT's form of a LoRA on an nn.Linear."""

    layout = "linear modules"

    def recognises(self, pair: FactorPair) -> bool:
        """Takes every module: what the base does not have is explained in `check`."""
        return True

    def check(self, pairs: list[FactorPair], context: FormatContext) -> None:
        """Each module must exist in the base with these dimensions."""
        for pair in pairs:
            dims = context.targets.linears.get(pair.module)
            if dims is None:
                context.problems.append(explain_unknown(pair.module, context.targets))
                continue
            leaf = pair.module.rsplit(".", 1)[-1]
            hidden = dims[1] if leaf in _IN_IS_HIDDEN else dims[0] if leaf in _OUT_IS_HIDDEN else None
            check_pair(pair, dims[0], dims[1], hidden, context)

    def build(
        self, pair: FactorPair, tensors: MutableMapping[str, Tensor], context: FormatContext, builder: AdapterBuilder
    ) -> None:
        """The factors are taken as they are."""
        a, b = take(pair, tensors)
        name = context.rules.name_in_patterns(pair.module)
        builder.linears[pair.module] = LoraPair(a, b, context.rules.scale(name, a.shape[0]))
