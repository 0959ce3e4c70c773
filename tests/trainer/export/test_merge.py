"""A merged base is what transformers makes of the base with every change added by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from loaders.adapter_types import LoraPair
from loaders.errors import CheckpointError
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.export.merge import merge_into_base
from tests.conftest import RecordNumber
from tests.oracle.adapters import merge_by_hand
from tests.oracle.base_models import Oracle, build_oracle, logits
from tests.oracle.shapes import SHAPES, V3, Shape
from tests.trainer.export.factors import Factors, draw

# Whole blocks only: transformers spreads the scales of edge blocks evenly over the rows, unlike DeepSeek.
WHOLE_BLOCKS = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "q_lora_rank": 128,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "vocab_size": 320,
}


def read_all(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def draw_for(base: Path) -> Factors:
    return draw(DeepseekConfig.from_dir(base).adapter_targets(), covers=lambda layer, expert: expert != 1)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.disk_model_type is None], ids=lambda s: s.name)
def test_a_merged_base_computes_what_the_changes_added_by_hand_compute(
    oracle: Callable[[Shape], Oracle], tmp_path: Path, record_number: RecordNumber, shape: Shape
) -> None:
    base = oracle(shape)
    factors = draw_for(base.path)
    report = merge_into_base(base.path, tmp_path / "merged", factors.linears, factors.experts, torch.float32)
    assert report.num_changed == len(factors.deltas())
    merged, prompt = load(tmp_path / "merged").double(), base.prompt(24)
    truth = logits(merge_by_hand(base.model, factors.deltas()).double(), prompt)
    assert (truth - logits(base.model, prompt)).abs().max() > 0.1
    difference = (logits(merged, prompt) - truth).abs().max().item()
    record_number(f"logits of a merged base, {shape.name}", difference, at_most=1e-5)


def test_names_shards_and_other_files_stay_as_they_were(oracle: Callable[[Shape], Oracle], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(oracle(V3).path, base)
    for name in ("tokenizer.json", "LICENSE", "modeling_x.py", "README.md", "pytorch_model.bin", ".hidden"):
        (base / name).write_bytes(name.encode())
    factors = draw_for(base)
    out = tmp_path / "merged"
    report = merge_into_base(base, out, factors.linears, factors.experts, torch.float32, "card")
    left_out = {"pytorch_model.bin", ".hidden"}
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()} - left_out
    for name in ("config.json", "tokenizer.json", "LICENSE", "modeling_x.py", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert (out / "README.md").read_text() == "card"

    old, new = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (base, out))
    assert new["weight_map"] == old["weight_map"]
    tensors, before = read_all(out), read_all(base)
    assert new["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values()) == report.num_bytes
    deltas = factors.deltas()
    for name, tensor in tensors.items():
        if name.removesuffix(".weight") not in deltas:
            assert torch.equal(tensor, before[name]), name


def test_bfloat16_is_rounded_once_and_the_router_correction_not_at_all(
    oracle: Callable[[Shape], Oracle], tmp_path: Path
) -> None:
    base = oracle(V3)
    factors = draw_for(base.path)
    merge_into_base(base.path, tmp_path / "merged", factors.linears, factors.experts)
    before, after, deltas = read_all(base.path), read_all(tmp_path / "merged"), factors.deltas()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, before[name])
            continue
        exact = before[name] + deltas.get(name.removesuffix(".weight"), 0)
        assert tensor.dtype == torch.bfloat16
        # Half a unit in the last of 8 binary digits, and the float32 sum's own error.
        assert ((tensor.float() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all(), name
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == json.loads((base.path / "config.json").read_text()) | {"torch_dtype": "bfloat16"}


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 values [out, in] and scales [out / 128, in / 128]."""
    blocks = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return values.to(torch.float8_e4m3fn), scale


def write_fp8_base(tmp_path: Path) -> Path:
    """A base as DeepSeek publishes it, with scales in a shard of their own and a prediction layer behind the last."""
    plain = build_oracle(replace(V3, config=V3.config | WHOLE_BLOCKS), tmp_path / "plain").path
    weights, scales = {}, {}
    tensors = read_all(plain)
    attention = [name for name in tensors if name.startswith("model.layers.1.self")]
    tensors |= {name.replace(".1.", ".2.", 1): tensors[name] for name in attention}
    for name, tensor in tensors.items():
        is_linear = name.endswith(("_proj.weight", "_mqa.weight"))
        if is_linear and tensor.shape[0] % 128 == 0 and tensor.shape[1] % 128 == 0:
            weights[name], scales[f"{name}_scale_inv"] = quantise(tensor)
        else:
            weights[name] = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
    base = tmp_path / "fp8"
    base.mkdir()
    weight_map = {}
    for file, content in (("a.safetensors", weights), ("b.safetensors", scales)):
        save_file(content, base / file)
        weight_map |= dict.fromkeys(content, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((plain / "config.json").read_text())
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config |= {"quantization_config": quantisation, "torch_dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_an_fp8_base_becomes_a_plain_one(tmp_path: Path, record_number: RecordNumber) -> None:
    base = write_fp8_base(tmp_path)
    factors = draw_for(base)
    out = tmp_path / "merged"
    report = merge_into_base(base, out, factors.linears, factors.experts, torch.float32)
    assert report.num_dequantised > 20
    assert not (out / "b.safetensors").exists()  # held scales only
    assert not any("scale_inv" in name for name in read_all(out))
    assert "model.layers.2.self_attn.o_proj.weight" in read_all(out)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float32"

    prompt = list(range(2, 26))
    theirs = load(base).float()  # transformers dequantises to float32, and leaves the rest in bfloat16
    truth = logits(merge_by_hand(theirs, factors.deltas()).double(), prompt)
    assert (truth - logits(theirs, prompt)).abs().max() > 0.1
    difference = (logits(load(out).double(), prompt) - truth).abs().max().item()
    record_number("logits of a merged fp8 base", difference, at_most=1e-5)


def test_a_base_that_does_not_fit_is_refused_before_anything_is_written(
    oracle: Callable[[Shape], Oracle], tmp_path: Path
) -> None:
    base = oracle(V3).path
    pair = LoraPair(torch.ones(2, 7), torch.ones(5, 2), 1.0)
    linears = {"lm_head": pair, "model.layers.7.self_attn.o_proj": pair}
    with pytest.raises(CheckpointError) as caught:
        merge_into_base(base, tmp_path / "merged", linears, {})
    assert any("lm_head.weight: [320, 64] in the files, [5, 7]" in problem for problem in caught.value.problems)
    assert any("layers.7.self_attn.o_proj.weight: not in the files" in problem for problem in caught.value.problems)
    with pytest.raises(ValueError, match=r"already holds config\.json"):
        factors = draw_for(base)
        merge_into_base(base, base, factors.linears, factors.experts)
    assert not any(tmp_path.iterdir())
