"""Adapter folders that must be refused: copies of a good one, each broken in one way."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Break = Callable[[Path], None]


def config(**values: object) -> Break:
    """Set keys of adapter_config.json."""

    def break_it(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return break_it


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Break:
    """Change the weights and write them back."""

    def break_it(folder: Path) -> None:
        loaded = load_file(folder / WEIGHTS)
        change(loaded)
        save_file({name: tensor.contiguous() for name, tensor in loaded.items()}, folder / WEIGHTS)

    return break_it


def raw(change: Callable[[bytes], bytes]) -> Break:
    """Change the bytes of the weights file."""

    def break_it(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return break_it


def with_header(header: object) -> Callable[[bytes], bytes]:
    """A safetensors file of this header and no data."""
    text = json.dumps(header).encode()
    return lambda _: struct.pack("<Q", len(text)) + text


def _first(loaded: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(loaded) if part in name)


def _set_nan(loaded: dict[str, torch.Tensor]) -> None:
    loaded[_first(loaded, "lora_B")].view(-1)[3] = float("nan")


def _set_infinite(loaded: dict[str, torch.Tensor]) -> None:
    loaded[_first(loaded, "lora_A")].view(-1)[0] = float("inf")


def _widen(loaded: dict[str, torch.Tensor]) -> None:
    name = _first(loaded, "lora_A")
    loaded[name] = torch.zeros(loaded[name].shape[0], loaded[name].shape[1] + 8)


def _unequal_ranks(loaded: dict[str, torch.Tensor]) -> None:
    name = _first(loaded, "self_attn.o_proj.lora_A")
    loaded[name] = torch.zeros(loaded[name].shape[0] + 8, loaded[name].shape[1])


def _drop_half(loaded: dict[str, torch.Tensor]) -> None:
    del loaded[_first(loaded, "lora_B")]


def _rename(old: str, new: str) -> Break:
    def change(loaded: dict[str, torch.Tensor]) -> None:
        for name in [name for name in loaded if old in name]:
            loaded[name.replace(old, new)] = loaded.pop(name)

    return tensors(change)


def _add(name: str, *shape: int) -> Break:
    def change(loaded: dict[str, torch.Tensor]) -> None:
        loaded[f"base_model.model.{name}"] = torch.ones(shape)

    return tensors(change)


def _integers(loaded: dict[str, torch.Tensor]) -> None:
    name = _first(loaded, "lora_A")
    loaded[name] = loaded[name].to(torch.int32)


def _other_base(loaded: dict[str, torch.Tensor]) -> None:
    """Every factor as a model of twice the width would have it."""
    for name, tensor in loaded.items():
        wide = tensor.shape[0], 2 * tensor.shape[1]
        loaded[name] = torch.zeros(wide) if "lora_A" in name else torch.zeros(2 * tensor.shape[0], tensor.shape[1])


def _link_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")


def _beside(name: str) -> Break:
    return lambda folder: (folder / name).write_bytes(b"\x80\x04.")  # type: ignore[return-value]


def _remove(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def _replace_config(text: str) -> Break:
    return lambda folder: (folder / CONFIG).write_text(text)  # type: ignore[return-value]


# What breaks it, and a piece of what the operator is told.
BROKEN: dict[str, tuple[Break, str]] = {
    "truncated": (raw(lambda data: data[:-1000]), "truncated"),
    "cut-in-the-header": (raw(lambda data: data[:20]), "too short"),
    "empty-file": (raw(lambda data: b""), "too short"),
    "trailing-bytes": (raw(lambda data: data + b"xx"), "after the last tensor"),
    "huge-header": (raw(lambda data: struct.pack("<Q", 2**40) + data[8:]), "header of"),
    "header-not-json": (raw(lambda data: data[:8] + b"}" + data[9:]), "header"),
    "git-lfs-pointer": (raw(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"), "LFS"),
    "shape-overflow": (
        raw(with_header({"a.lora_A.weight": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}})),
        "a.lora_A.weight",
    ),
    "nan": (tensors(_set_nan), "NaN"),
    "infinity": (tensors(_set_infinite), "infinite"),
    "wrong-shape": (tensors(_widen), "lora_A"),
    "unequal-ranks": (tensors(_unequal_ranks), "rank"),
    "half-a-pair": (tensors(_drop_half), "no lora_B"),
    "integer-weights": (tensors(_integers), "I32"),
    "wrong-base": (tensors(_other_base), "expected"),
    "unknown-module": (_rename("self_attn.o_proj", "self_attn.out_proj"), "out_proj"),
    "no-such-layer": (_rename("layers.3.", "layers.17."), "17"),
    "router": (_add("model.layers.1.mlp.gate.lora_A.weight", 8, 192), "gate"),
    "embedding": (_add("model.embed_tokens.lora_embedding_A", 8, 1024), "embedding"),
    "dora-magnitude": (_add("model.layers.0.self_attn.o_proj.lora_magnitude_vector", 192), "DoRA"),
    "bias": (_add("model.layers.0.self_attn.o_proj.lora_B.bias", 192), "bias"),
    "full-weight": (_add("lm_head.weight", 1024, 192), "full weight"),
    "unknown-tensor": (_add("model.surprise", 4), "surprise"),
    "no-weights": (_remove(WEIGHTS), WEIGHTS),
    "no-config": (_remove(CONFIG), CONFIG),
    "config-not-json": (_replace_config("{"), CONFIG),
    "config-a-list": (_replace_config("[]"), CONFIG),
    "unknown-key": (config(new_maths=3), "new_maths"),
    "dora": (config(use_dora=True), "use_dora"),
    "not-lora": (config(peft_type="IA3"), "peft_type"),
    "bias-in-config": (config(bias="all"), "bias"),
    "pissa": (config(init_lora_weights="pissa"), "init_lora_weights"),
    "negative-alpha": (config(lora_alpha=-1), "lora_alpha"),
    "layer-replication": (config(layer_replication=[[0, 2]]), "layer_replication"),
    "pickle-beside": (_beside("adapter_model.bin"), "adapter_model.bin"),
    "another-pickle-beside": (_beside("weights.pkl"), "weights.pkl"),
}


def write_broken(good: Path, root: Path) -> None:
    """All of them below `root`, and `linked`, whose weights are a symbolic link."""
    for name, (break_it, _) in BROKEN.items():
        shutil.copytree(good, root / name)
        break_it(root / name)
    shutil.copytree(good, root / "linked")
    _link_weights(root / "linked")
