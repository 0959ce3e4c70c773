"""Does a base checkpoint hold what the model expects? Every difference by name, and the likely cause."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loaders.base_files import BaseFiles, BaseTensor
from loaders.base_types import TensorSpec
from loaders.config_json import MAX_CONFIG_BYTES
from loaders.errors import CheckpointError
from loaders.family import models_with_hidden
from loaders.fp8 import SCALE_SUFFIX, num_blocks
from loaders.json_file import read_json_object

DEFAULT_BLOCK = (128, 128)
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_LAYER = re.compile(r"^model\.layers\.([0-9]+)\.")
_EXPERT = re.compile(r"\.mlp\.experts\.[0-9]+\.")
_OTHER_MODALITIES = ("vision_tower.", "vision_model.", "visual.", "mm_projector.", "multi_modal_projector.")
_OTHER_QUANTISATION = (".weight_packed", ".qweight", ".weight_scale", ".weight_scale_2", ".qzeros", ".absmax")


@dataclass
class BaseCheck:
    """The outcome of `check_base`: problems by name, and what was skipped with reasons."""

    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()

    def likely_cause(self, files: BaseFiles, config: Mapping[str, Any]) -> str:
        """A clause for the headline that names the most probable reason of the differences, or nothing."""
        for cause in (_broken_files(files), _saved_otherwise(self), _tied(self, config), _other_shape(self)):
            if cause:
                return f"; likely cause: {cause}"
        return ""


def check_quantisation(model_dir: Path) -> tuple[dict[str, Any], tuple[int, int]]:
    """config.json (empty if there is none) and the fp8 block; other quantisation methods raise CheckpointError."""
    path = model_dir / "config.json"
    config = read_json_object(path, MAX_CONFIG_BYTES, CheckpointError) if path.is_file() else {}
    text_config = config.get("text_config")
    quantisation = config.get("quantization_config") or config.get("compression_config")
    if not quantisation and isinstance(text_config, dict):
        quantisation = text_config.get("quantization_config")
    if not quantisation:
        return config, DEFAULT_BLOCK
    where = f"{path}: quantization_config"
    if not isinstance(quantisation, dict):
        raise CheckpointError(f"{where} must be an object")
    method = quantisation.get("quant_method")
    if method != "fp8":
        raise CheckpointError(
            f"{where}: quant_method {method!r} is not supported; only fp8 with 128x128 blocks and unquantised "
            "(bf16, fp16, fp32) weights are read"
        )
    block = quantisation.get("weight_block_size", list(DEFAULT_BLOCK))
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise CheckpointError(f"{where}.weight_block_size must be two positive integers, found {block!r}")
    return config, (block[0], block[1])


def check_base(
    files: BaseFiles, expected: Mapping[str, TensorSpec], ignored_layers_from: int, block: tuple[int, int]
) -> BaseCheck:
    """Compare every stored tensor with `expected`; nothing is read but headers."""
    check = BaseCheck()
    by_name = {tensor.name: tensor for tensor in files.tensors}
    ignored_layers: Counter[int] = Counter()
    skipped: list[tuple[str, str]] = []
    for tensor in files.tensors:
        layer = _LAYER.match(tensor.name)
        if tensor.name in expected:
            _check_tensor(tensor, expected[tensor.name], by_name.get(tensor.name + SCALE_SUFFIX), block, check)
        elif layer and int(layer[1]) >= ignored_layers_from:
            ignored_layers[int(layer[1])] += 1
        elif tensor.name.endswith("rotary_emb.inv_freq"):
            skipped.append((tensor.name, "computed from config.json"))
        elif files.multimodal and tensor.name.startswith(_OTHER_MODALITIES):
            skipped.append((tensor.name, "not part of the text model"))
        elif not _is_scale_of_expected(tensor, expected):
            check.unexpected.append(tensor.name)
            check.problems.append(f"{tensor.name}: unexpected tensor {list(tensor.stored.shape)}")
    for layer_index, count in sorted(ignored_layers.items()):
        reason = f"{count} tensors of a multi-token-prediction layer, which serving does not use"
        skipped.append((f"model.layers.{layer_index}.*", reason))
    check.missing = [name for name in expected if name not in by_name]
    check.problems.extend(f"{name}: missing, expected {list(expected[name].shape)}" for name in check.missing)
    check.skipped = tuple(skipped)
    return check


def _is_scale_of_expected(tensor: BaseTensor, expected: Mapping[str, TensorSpec]) -> bool:
    return tensor.name.endswith(SCALE_SUFFIX) and tensor.name.removesuffix(SCALE_SUFFIX) in expected


def _check_tensor(
    tensor: BaseTensor, spec: TensorSpec, scale: BaseTensor | None, block: tuple[int, int], check: BaseCheck
) -> None:
    name, stored = tensor.name, tensor.stored
    if stored.shape != tuple(spec.shape):
        check.misshaped[name] = (tuple(spec.shape), stored.shape)
        check.problems.append(f"{name}: shape {list(stored.shape)} on disk, expected {list(spec.shape)}")
    elif stored.dtype is torch.float8_e4m3fn:
        _check_scale(tensor, scale, block, check)
    elif stored.dtype not in _PLAIN_DTYPES:
        check.problems.append(f"{name}: stored as {stored.dtype_name}, which is not a supported weight type")
    elif scale is not None:
        check.problems.append(f"{scale.name}: a scale, but {name} is {stored.dtype_name} and not fp8 (F8_E4M3)")


def _check_scale(tensor: BaseTensor, scale: BaseTensor | None, block: tuple[int, int], check: BaseCheck) -> None:
    if len(tensor.stored.shape) != 2:
        check.problems.append(f"{tensor.name}: fp8 tensors must have two dimensions")
    elif scale is None:
        check.problems.append(f"{tensor.name}: is fp8, but {tensor.name}{SCALE_SUFFIX} is missing")
    elif scale.stored.shape != num_blocks(tensor.stored.shape, block):
        wanted = list(num_blocks(tensor.stored.shape, block))
        check.problems.append(
            f"{scale.name}: shape {list(scale.stored.shape)} on disk, expected {wanted} for blocks of "
            f"{block[0]}x{block[1]}"
        )
    elif scale.stored.dtype not in _SCALE_DTYPES:
        check.problems.append(f"{scale.name}: stored as {scale.stored.dtype_name}, expected F32, BF16 or F8_E8M0")


def _broken_files(files: BaseFiles) -> str:
    return "an unfinished or damaged download (see the files named below)" if files.problems else ""


def _saved_otherwise(check: BaseCheck) -> str:
    if any(name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")) for name in check.unexpected):
        return "experts stored fused, as transformers keeps them in memory; save with save_pretrained for disk names"
    if any(name.endswith(_OTHER_QUANTISATION) for name in check.unexpected):
        return "weights quantised by a method that is not supported (only fp8 with weight_scale_inv blocks is)"
    return ""


def _tied(check: BaseCheck, config: Mapping[str, Any]) -> str:
    if check.missing == ["lm_head.weight"] and not check.unexpected:
        tied = "tie_word_embeddings is true in config.json" if config.get("tie_word_embeddings") else "tied embeddings"
        return f"lm_head shares the embedding ({tied}); tied weights are not supported, save an untied copy"
    return ""


def _other_shape(check: BaseCheck) -> str:
    """Differences in structure say which member of the family the files are, or what config.json got wrong."""
    advice = "does config.json belong to these weights?"
    embedding = check.misshaped.get("model.embed_tokens.weight")
    if embedding and embedding[0][-1] != embedding[1][-1]:
        wanted, hidden = embedding[0][-1], embedding[1][-1]
        return f"weights with hidden size {hidden}{models_with_hidden(hidden)}, config.json says {wanted}; {advice}"
    for subject, names in (("fewer", check.unexpected), ("more", check.missing)):
        if names and all(_EXPERT.search(name) for name in names):
            return f"config.json names {subject} routed experts (n_routed_experts) than the weights have; {advice}"
        if any(name.endswith(".input_layernorm.weight") for name in names) and all(map(_LAYER.match, names)):
            return f"config.json names {subject} layers (num_hidden_layers) than the weights have; {advice}"
    if any(name.endswith(".q_proj.weight") for name in check.unexpected):
        return f"weights without q_lora_rank (shape of V2-Lite or Moonlight), config.json sets it; {advice}"
    if any(name.endswith(".q_proj.weight") for name in check.missing):
        return f"weights with q_lora_rank (shape of V3, V2 or K2), config.json sets none; {advice}"
    if any(name.endswith("e_score_correction_bias") for name in check.missing):
        return f"V2-type weights (softmax router without correction bias) with a V3-type config.json; {advice}"
    if embedding:
        return f"vocabulary of {embedding[1][0]} on disk, config.json says {embedding[0][0]}; {advice}"
    return advice if check.misshaped else ""
