"""The official fp8 block form loads to exactly the dequantised weights."""

import json
from pathlib import Path

import pytest
import torch
from loader_builders import make_model, read_all, specs_of, write_model
from torch import Tensor

from loaders.base import TensorSpec, plan_base, stream_base
from loaders.errors import CheckpointError
from loaders.fp8 import scale_to_float32

FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
# Exact multiples, edges on either side (kv_a of V3 has 576 rows), and less than one block.
SHAPES = {"a": (256, 384), "b": (576, 200), "c": (130, 128), "d": (64, 40)}


def quantise(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """fp8 values and scales of a weight, block by block, in plain loops."""
    rows, cols = weight.shape
    scale = torch.empty(-(-rows // block), -(-cols // block))
    result = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[i, j] = weight[part].abs().max() / 448
            result[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return result, scale


def dequantise_by_index(values: Tensor, scale: Tensor, block: int = 128) -> Tensor:
    """W[i, j] = fp8[i, j] * scale[i // block, j // block], as the formula is written."""
    i, j = torch.meshgrid(*(torch.arange(size) // block for size in values.shape), indexing="ij")
    return values.float() * scale[i, j]


def expected_of(shapes: dict[str, tuple[int, int]]) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec(shape) for name, shape in shapes.items()}


def model_in_two_shards(path: Path, scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights in one shard, scales in the other; returns what must come out."""
    torch.manual_seed(0)
    weights, scales, result = {}, {}, {}
    for name, shape in SHAPES.items():
        values, scale = quantise(torch.randn(shape))
        stored = scale.to(scale_dtype)
        weights[f"{name}.weight"], scales[f"{name}.weight_scale_inv"] = values, stored
        result[f"{name}.weight"] = dequantise_by_index(values, stored.float())
    scales["norm.weight"] = result["norm.weight"] = torch.randn(40)
    write_model(path, [weights, scales], FP8)
    return result


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_block_scales_in_another_shard_give_exactly_the_dequantised_weights(
    tmp_path: Path, scale_dtype: torch.dtype
) -> None:
    result = model_in_two_shards(tmp_path, scale_dtype)
    expected = expected_of(SHAPES) | {"norm.weight": TensorSpec((40,))}
    for dtype in (torch.float32, torch.bfloat16):
        loaded = dict(stream_base(tmp_path, expected, dtype, ignored_layers_from=1))
        assert loaded.keys() == result.keys()
        assert all(torch.equal(loaded[name], tensor.to(dtype)) for name, tensor in result.items())
    assert plan_base(tmp_path, expected, ignored_layers_from=1).report.dequantised == 4


def test_an_fp8_model_loads_to_the_weights_that_transformers_dequantises(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    # Whole blocks only: transformers 5.23 spreads the scales of edge blocks evenly over the rows, unlike DeepSeek.
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    model = make_model(**sizes, **heads, kv_lora_rank=96, q_lora_rank=128)
    model.save_pretrained(tmp_path / "plain")
    tensors = read_all(tmp_path / "plain")
    quantised: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(("_proj.weight", "_mqa.weight")) and tensor.shape[1] % 128 == 0:
            quantised[name], quantised[name + "_scale_inv"] = quantise(tensor)
        else:
            quantised[name] = tensor
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    path = write_model(tmp_path / "fp8", [quantised], config | FP8)
    ours = dict(stream_base(path, specs_of(tensors), torch.float32, ignored_layers_from=2))

    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    for name in [name for name in theirs if ".mlp.experts." in name]:  # fused in memory
        parts = {"down_proj": theirs[name]}
        if name.endswith("gate_up_proj"):
            parts = dict(zip(("gate_proj", "up_proj"), theirs[name].chunk(2, dim=1), strict=True))
        del theirs[name]
        for kind, stack in parts.items():
            theirs |= {f"{name.rpartition('.')[0]}.{n}.{kind}.weight": expert for n, expert in enumerate(stack)}
    assert ours.keys() == theirs.keys()
    assert len(quantised) - len(tensors) > 20
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_another_block_size_is_taken_from_the_config(tmp_path: Path) -> None:
    values, scale = quantise(torch.randn(96, 70), block=32)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    write_model(tmp_path, [{"a.weight": values, "a.weight_scale_inv": scale}], config)
    loaded = dict(stream_base(tmp_path, expected_of({"a": (96, 70)}), torch.float32, ignored_layers_from=1))
    assert torch.equal(loaded["a.weight"], dequantise_by_index(values, scale, block=32))


def test_many_strips_give_the_same_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = model_in_two_shards(tmp_path)
    monkeypatch.setattr("loaders.fp8._STRIP_ELEMENTS", 1)
    expected = expected_of(SHAPES) | {"norm.weight": TensorSpec((40,))}
    loaded = dict(stream_base(tmp_path, expected, torch.float32, ignored_layers_from=1))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in result.items())


def test_every_exponent_of_an_e8m0_scale_is_a_power_of_two() -> None:
    scale = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert scale_to_float32(scale).tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert scale_to_float32(torch.tensor([255], dtype=torch.uint8).view(torch.float8_e8m0fnu)).isnan().all()


def test_wrong_or_missing_scales_are_refused_by_name(tmp_path: Path) -> None:
    values, scale = quantise(torch.randn(256, 256))
    tensors = {
        "a.weight": values,
        "b.weight": values.clone(),
        "b.weight_scale_inv": scale[:1].clone(),
        "c.weight": torch.randn(256, 256),
        "c.weight_scale_inv": scale.clone(),
        "d.weight": values.clone(),
        "d.weight_scale_inv": scale.to(torch.int32),
        "e.weight_scale_inv": scale.clone(),
    }
    write_model(tmp_path, [tensors], FP8)
    expected = expected_of(dict.fromkeys("abcd", (256, 256)))
    with pytest.raises(CheckpointError) as caught:
        stream_base(tmp_path, expected, torch.float32, ignored_layers_from=1)
    words = {
        "a.weight": "weight_scale_inv is missing",
        "b.weight_scale_inv": "expected [2, 2] for blocks of 128x128",
        "c.weight_scale_inv": "c.weight is F32 and not fp8",
        "d.weight_scale_inv": "stored as I32",
        "e.weight_scale_inv": "unexpected tensor",
    }
    assert len(caught.value.problems) == len(words)
    for name, text in words.items():
        assert any(p.startswith(f"{name}:") and text in p for p in caught.value.problems), name
