"""Adapter layouts, one per file. A new layout is a new file here and an entry in FORMATS.

Each turns pairs of factors as stored into plain ones: an ordinary linear module, or gate / up / down of one expert.
"""

from loaders.adapter_formats.automodel import AutomodelFormat
from loaders.adapter_formats.base import AdapterBuilder, AdapterFormat, FormatContext
from loaders.adapter_formats.expert_stacks import SGLANG_PARTS, TINKER_PARTS, ExpertStackFormat
from loaders.adapter_formats.linear import LinearFormat
from loaders.adapter_formats.param_wrapper import ParamWrapperFormat
from loaders.adapter_formats.per_expert import MIXTRAL_PROJECTIONS, PEFT_PROJECTIONS, PerExpertFormat
from loaders.adapter_formats.shared_outer import SharedOuterFormat
from loaders.adapter_formats.stack_order import WRITERS

__all__ = ["FORMATS", "WRITERS", "AdapterBuilder", "AdapterFormat", "FormatContext"]

# The first format that recognises a pair gets it; LinearFormat takes the rest and explains what it does not know.
FORMATS: tuple[AdapterFormat, ...] = (
    PerExpertFormat("PEFT per-expert 2-D factors", "mlp", PEFT_PROJECTIONS),
    PerExpertFormat("Mixtral-style per-expert factors", "block_sparse_moe", MIXTRAL_PROJECTIONS),
    PerExpertFormat("Mixtral-style per-expert factors (w1, w2, w3)", "mlp", MIXTRAL_PROJECTIONS),
    SharedOuterFormat(),
    ExpertStackFormat("SGLang 3-D stacks", SGLANG_PARTS),
    ExpertStackFormat("Tinker stacks (w1, w2, w3)", TINKER_PARTS),
    AutomodelFormat(),
    ParamWrapperFormat(),
    LinearFormat(),
)
