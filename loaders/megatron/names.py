"""Names of LoRA factors in Megatron's model: `decoder.layers.N. ...`, layers counted from the stage's first one."""

import re
from dataclasses import dataclass
from typing import Literal

from loaders.adapter_names import plain_key

_LAYER = re.compile(r"^decoder\.layers\.(0|[1-9]\d{0,4})\.(.+)$")
_GROUPED = re.compile(r"^mlp\.experts\.weight([12])_lora_([ab])$")
_LINEAR = re.compile(
    r"^(?P<module>self_attention\.linear_(?:qkv|proj)|(?:mlp|mlp\.shared_experts)\.linear_fc[12]"
    r"|mlp\.experts\.local_experts\.(?P<expert>0|[1-9]\d{0,4})\.linear_fc[12])"
    r"\.lora_(?P<side>[AB])(?:\.(?!weight$)\w+)?\.weight$"
)


@dataclass(frozen=True)
class MegatronKey:
    """A factor: the layer in its stage, the module (without the local expert's index), and the side."""

    layer: int
    module: str
    side: Literal["A", "B"]
    expert: int | None = None


def split_key(name: str) -> MegatronKey | None:
    """The parts of a factor's name; None for everything else."""
    match = _LAYER.match(plain_key(name))
    if match is None:
        return None
    layer, rest = int(match[1]), match[2]
    if grouped := _GROUPED.match(rest):
        return MegatronKey(layer, f"mlp.experts.weight{grouped[1]}", "A" if grouped[2] == "a" else "B")
    if linear := _LINEAR.match(rest):
        expert = linear["expert"]
        module = linear["module"] if expert is None else f"mlp.experts.{linear['module'].rpartition('.')[2]}"
        index = None if expert is None else int(expert)
        return MegatronKey(layer, module, "A" if linear["side"] == "A" else "B", index)
    return None
