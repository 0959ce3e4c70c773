"""Write an adapter as the folder that Graft, vLLM, SGLang and PEFT read.

`per-expert` (default) has one pair of 2-D factors per expert and projection, as PEFT wrote on transformers 4: the one
layout that all of them accept. It holds only the experts that are adapted, which PEFT on transformers 5 refuses.
`peft-v5` has PEFT's stacks of all experts, zeros where nothing was adapted; it is for PEFT.
Either way the file has one rank and one scale (`uniform`), and use_rslora is false.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loaders.adapter_folder import CONFIG_FILE, SINGLE_FILE
from loaders.adapter_types import AdapterTargets, LoraPair
from runtime.trainer.config import EXPORT_FORMATS
from runtime.trainer.export.folder import check_replaceable, replacing_folder
from runtime.trainer.export.layouts import (
    PROJECTIONS,
    Experts,
    FileTensor,
    Layout,
    Linears,
    named_pairs,
    per_expert_tensors,
    projection_of,
    stacked_tensors,
)
from runtime.trainer.export.peft_config import per_expert_config, stacked_config
from runtime.trainer.export.safetensors_writer import write_safetensors
from runtime.trainer.export.uniform import uniform_of

CARD_FILE = "README.md"
_OWN_FILES = (CONFIG_FILE, SINGLE_FILE, CARD_FILE)
ADAPTER_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
_LAYOUT_NOTES = {
    "per-expert": {"layout": "per-expert 2-D", "rank": "per expert and projection"},
    "peft-v5": {
        "layout": "peft ParamWrapper stacks",
        "lora_A": "[experts * rank, in], experts outermost",
        "lora_B": "[out, rank * experts], experts innermost (rank_major)",
        "rank": "per expert; gate rows before up rows",
    },
}


@dataclass(frozen=True)
class ExportOptions:
    """How to write an adapter. `metadata` is added to that of the safetensors file."""

    format: str = "per-expert"
    dtype: torch.dtype = torch.bfloat16
    base_name: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def validate(self) -> None:
        """Raise ValueError naming the field, its value and what is allowed."""
        if self.format not in EXPORT_FORMATS:
            raise ValueError(f"format = {self.format!r} is not allowed: one of {', '.join(EXPORT_FORMATS)}")
        if self.dtype not in ADAPTER_DTYPES.values():
            raise ValueError(f"dtype = {self.dtype} is not allowed: one of {', '.join(ADAPTER_DTYPES)}")


def write_adapter(
    path: Path,
    linears: Linears,
    experts: Experts,
    targets: AdapterTargets,
    options: ExportOptions,
    card: str | None = None,
) -> int:
    """Write the folder `path` whole or not at all; returns its bytes.

    `linears` by disk name and `experts` by layer and expert, a [r, in] and b [out, r] in any floating dtype; ranks and
    scales may differ. An adapter that is there is replaced in the last step. Raises ValueError for factors that do not
    fit `targets` or `options` or are not finite, WriteError if the disk does not take the files.
    """
    options.validate()
    _check_fits(linears, experts, targets)
    uniform = uniform_of(named_pairs(linears, experts))
    make_tensors, make_config = per_expert_tensors, per_expert_config
    if options.format == "peft-v5":
        make_tensors, make_config = stacked_tensors, stacked_config
    tensors = list(make_tensors(linears, experts, Layout(targets, uniform, options.dtype)))
    config = make_config(linears, experts, targets, uniform, options.base_name)
    metadata = {"format": "pt"} | _LAYOUT_NOTES[options.format] | dict(options.metadata)
    texts = {CONFIG_FILE: json.dumps(config, indent=2) + "\n"} | ({} if card is None else {CARD_FILE: card})
    with replacing_folder(path, _OWN_FILES) as folder:
        headers = [tensor.header for tensor in tensors]
        num_bytes = write_safetensors(folder / SINGLE_FILE, headers, _made(tensors), metadata)
        for name, text in texts.items():
            num_bytes += (folder / name).write_bytes(text.encode())
    return num_bytes


def check_adapter_folder(path: Path) -> None:
    """Raises ValueError if `write_adapter` would refuse `path`, because something else lies there."""
    check_replaceable(path.resolve(), _OWN_FILES)


def export_notes(linears: Linears, experts: Experts, targets: AdapterTargets, options: ExportOptions) -> list[str]:
    """Sentences for the model card: what the file holds, and who reads it."""
    uniform = uniform_of(named_pairs(linears, experts))
    num_all = sum(shape.num_experts for shape in targets.experts.values())
    num_adapted = sum(len(adapted) for adapted in experts.values())
    dtype = str(options.dtype).removeprefix("torch.")
    notes = [
        f"Changes {num_adapted} of the {num_all} routed experts and {len(linears)} other modules; rank "
        f"{uniform.lora_rank}, scale {uniform.scale:g}, stored in {dtype}."
    ]
    if options.format == "peft-v5":
        notes.append("Stacks of all experts as PEFT 0.19 and later keeps them on transformers 5; Graft reads them too.")
        return notes
    notes.append("One pair of factors per expert and projection: Graft, vLLM and SGLang read this file.")
    if any(0 < len(adapted) < targets.experts[layer].num_experts for layer, adapted in experts.items()):
        notes.append(
            "Only adapted experts are in the file. Graft and vLLM take it as it is; PEFT on transformers 5 needs every "
            "expert of a layer and refuses it: for PEFT, export it with `graft export --format peft-v5`."
        )
    return notes


def _made(tensors: Iterable[FileTensor]) -> Iterator[Tensor]:
    for file_tensor in tensors:
        tensor = file_tensor.make()
        if not bool(torch.isfinite(tensor).all()):
            name = file_tensor.header.name
            if tensor.dtype == torch.float16:
                raise ValueError(f"{name}: not finite in float16: export in bfloat16, or did training diverge?")
            raise ValueError(f"{name}: holds NaN or infinite values; did training diverge?")
        yield tensor


def _check_fits(linears: Linears, experts: Experts, targets: AdapterTargets) -> None:
    """Raise ValueError naming the first module that the base does not have in this shape."""
    if next(named_pairs(linears, experts), None) is None:
        raise ValueError("the adapter changes nothing: there is no module to write")
    for name, pair in linears.items():
        if name not in targets.linears:
            raise ValueError(f"{name}: the base has no such module to adapt")
        _check_shape(name, pair, *targets.linears[name])
    for layer, adapted in experts.items():
        shape = targets.experts.get(layer)
        if shape is None:
            raise ValueError(f"layer {layer} of the base has no routed experts")
        for expert, lora in adapted.items():
            if not 0 <= expert < shape.num_experts:
                raise ValueError(f"layer {layer} of the base has no expert {expert}, only {shape.num_experts} of them")
            for projection in PROJECTIONS:
                expert_pair = projection_of(lora, projection)
                if expert_pair is not None:
                    dims = (shape.intermediate, shape.hidden)
                    dims = dims if projection != "down" else dims[::-1]
                    _check_shape(f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj", expert_pair, *dims)


def _check_shape(name: str, pair: LoraPair, num_out: int, num_in: int) -> None:
    a, b = tuple(pair.a.shape), tuple(pair.b.shape)
    if len(a) != 2 or a[0] < 1 or a != (a[0], num_in) or b != (num_out, a[0]):
        raise ValueError(f"{name}: a {list(a)} and b {list(b)} do not fit the base, which is [{num_out}, {num_in}]")
