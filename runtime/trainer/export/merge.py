"""Write a base with an adapter merged into it: the same names and shards, plain weights, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loaders.adapter_types import LoraPair
from loaders.base import BasePlan, TensorSpec, plan_base
from loaders.base_files import INDEX_FILE, BaseTensor, find_base_files
from loaders.config_json import MAX_CONFIG_BYTES
from loaders.errors import CheckpointError
from loaders.fp8 import SCALE_SUFFIX
from loaders.json_file import read_json_object
from runtime.trainer.export.folder import replacing_folder
from runtime.trainer.export.layouts import Experts, Linears, named_pairs
from runtime.trainer.export.safetensors_writer import TensorHeader, write_safetensors

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"),
)
_QUANTISATION_KEYS = ("quantization_config", "compression_config")
_DTYPE_KEYS = ("torch_dtype", "dtype")
_ALL_LAYERS = 1 << 30


@dataclass(frozen=True)
class MergeReport:
    """Bytes of the merged weights, weights that the adapter changed, and fp8 weights that became plain ones."""

    num_bytes: int
    num_changed: int
    num_dequantised: int


def merge_into_base(
    base_dir: Path,
    out: Path,
    linears: Linears,
    experts: Experts,
    dtype: torch.dtype = torch.bfloat16,
    card: str | None = None,
) -> MergeReport:
    """Write the folder `out` with every weight W [out, in] of `base_dir` as W + scale * b @ a, in `dtype`.

    The sum is taken in float32 and rounded once; router corrections stay float32. An fp8 base is dequantised: its
    scales and its quantization_config are left out. Other files are copied as they are, `card` replaces README.md.
    Holds one tensor at a time. Raises CheckpointError for a base that cannot be read or does not fit, ValueError if
    `out` is not empty, WriteError if the disk does not take the files.
    """
    pairs = dict(named_pairs(linears, experts))
    plan = _plan(base_dir, pairs)
    texts = {CONFIG_FILE: _merged_config(base_dir, dtype)} | ({} if card is None else {CARD_FILE: card.encode()})
    with replacing_folder(out) as folder:
        weight_map, num_bytes = _write_shards(plan, folder, pairs, dtype)
        if (base_dir / INDEX_FILE).is_file():
            index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            texts[INDEX_FILE] = (json.dumps(index, indent=2) + "\n").encode()
        for path in _other_files(base_dir):
            if path.name not in texts:
                shutil.copyfile(path, folder / path.name)
        for name, data in texts.items():
            (folder / name).write_bytes(data)
    return MergeReport(num_bytes, len(pairs), plan.report.dequantised)


def _plan(base_dir: Path, pairs: Mapping[str, LoraPair]) -> BasePlan:
    """A plan for every tensor of the files, prediction layers and other modalities included."""
    files = find_base_files(base_dir)
    expected = {
        tensor.name: TensorSpec(tensor.stored.shape, tensor.name.endswith("e_score_correction_bias"))
        for tensor in files.tensors
        if not tensor.name.endswith(SCALE_SUFFIX)
    }
    plan = plan_base(base_dir, expected, ignored_layers_from=_ALL_LAYERS)
    problems = list(_misfits(pairs, expected))
    if problems:
        raise CheckpointError(f"{base_dir}: the adapter does not fit the weights", problems)
    return plan


def _misfits(pairs: Mapping[str, LoraPair], expected: Mapping[str, TensorSpec]) -> Iterator[str]:
    for module, pair in pairs.items():
        spec, shape = expected.get(f"{module}.weight"), (pair.b.shape[0], pair.a.shape[1])
        if spec is None:
            cause = " (it is tied to the embedding)" if module == "lm_head" else ""
            yield f"{module}.weight: not in the files{cause}, but the adapter changes it"
        elif spec.shape != shape:
            yield f"{module}.weight: {list(spec.shape)} in the files, {list(shape)} in the adapter"


def _write_shards(
    plan: BasePlan, folder: Path, pairs: Mapping[str, LoraPair], dtype: torch.dtype
) -> tuple[dict[str, str], int]:
    """Write each shard under its own name; returns tensor -> file and the bytes of all tensors."""
    shards: dict[int, list[BaseTensor]] = defaultdict(list)
    for tensor in plan.tensors:
        shards[tensor.shard].append(tensor)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, tensors in shards.items():  # a shard of nothing but scales is left out
        name = plan.files.shards[number].name
        final = {t.name: torch.float32 if plan.expected[t.name].keep_float32 else dtype for t in tensors}
        groups = [[t for t in tensors if final[t.name].itemsize == width] for width in (4, 2)]
        ordered = groups[0] + groups[1]
        headers = [TensorHeader(t.stored.name, final[t.name], t.stored.shape) for t in ordered]
        write_safetensors(folder / name, headers, _merged(plan, groups, pairs, final), {"format": "pt"})
        weight_map |= {header.name: name for header in headers}
        num_bytes += sum(header.num_bytes for header in headers)
    return weight_map, num_bytes


def _merged(
    plan: BasePlan,
    groups: Sequence[Sequence[BaseTensor]],
    pairs: Mapping[str, LoraPair],
    final: Mapping[str, torch.dtype],
) -> Iterator[Tensor]:
    for group in groups:
        names = {tensor.name for tensor in group}
        for name, tensor in plan.stream(torch.float32, wanted=names.__contains__):
            pair = pairs.get(name.removesuffix(".weight"))
            if pair is not None:
                tensor.addmm_(pair.b.float().cpu(), pair.a.float().cpu(), alpha=pair.scale)
            yield tensor.to(final[name])


def _merged_config(base_dir: Path, dtype: torch.dtype) -> bytes:
    """config.json: the same bytes, unless it names a quantisation or another dtype."""
    path = base_dir / CONFIG_FILE
    config = read_json_object(path, MAX_CONFIG_BYTES, CheckpointError)
    text_config = config.get("text_config")
    parts: list[dict[str, Any]] = [config] + ([text_config] if isinstance(text_config, dict) else [])
    is_changed = False
    for part in parts:
        for key in _QUANTISATION_KEYS:
            is_changed |= part.pop(key, None) is not None
        for key in _DTYPE_KEYS:
            if key in part and part[key] != str(dtype).removeprefix("torch."):
                part[key], is_changed = str(dtype).removeprefix("torch."), True
    if not is_changed:
        return path.read_bytes()
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _other_files(base_dir: Path) -> Iterator[Path]:
    """Tokenizer, generation settings, licence, code: all files beside the weights that are not weights themselves."""
    for path in sorted(base_dir.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHT_SUFFIXES):
            yield path
