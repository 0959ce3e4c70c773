"""The text of `graft inspect`."""

from pathlib import Path

from loader_builders import TinyModel, expert_factors, factors, write_adapter

from loaders.adapter import describe, load_adapter
from loaders.adapter_report import ranges


def test_the_description_shows_modules_ranks_scales_experts_bytes_skipped_keys_and_warnings(
    tiny: TinyModel, tmp_path: Path
) -> None:
    tensors = expert_factors(1, 0) | expert_factors(1, 1) | expert_factors(1, 3)
    tensors |= factors("model.layers.2.mlp.experts.2.down_proj", 48, 16, lora_rank=2)
    tensors |= factors("model.layers.3.self_attn.o_proj", 48, 24)
    for layer in range(3):
        tensors |= factors(f"model.layers.{layer}.self_attn.o_proj", 48, 24)
    weights = load_adapter(write_adapter(tmp_path, tensors), tiny.targets)
    lines = describe(weights, tiny.targets).splitlines()
    assert lines[0] == "layout     PEFT per-expert 2-D factors + linear modules"
    assert lines[1] == "evidence   keys mlp.experts.K.{gate_proj,up_proj,down_proj} with a 2-D pair each"
    assert lines[2] == f"digest     {weights.digest}"
    assert lines[3] == f"bytes      {weights.num_bytes:,} ({weights.num_bytes / 1024:.1f} KiB)"
    assert "  self_attn.o_proj  layers 0-2  rank 4  scale 2" in lines
    assert "  layers 1  3 of 4 experts  0-1,3  gate up down  rank 4  scale 2" in lines
    assert "  layers 2  1 of 4 experts  2      down          rank 2  scale 4" in lines
    assert any("model.layers.3" in line and "multi-token-prediction" in line for line in lines)
    assert any("another rank than r = 4" in line for line in lines)


def test_long_lists_are_shortened(tiny: TinyModel, tmp_path: Path) -> None:
    assert ranges([5, 1, 2, 3, 9]) == "1-3,5,9"
    assert ranges(range(0, 100, 2), 3) == "0,2,4,..."
    tensors = factors("lm_head", 96, 48)
    for module in range(30):
        tensors |= factors(f"model.layers.3.mlp.experts.{module}.up_proj", 16, 48)
    text = describe(load_adapter(write_adapter(tmp_path, tensors), tiny.targets), tiny.targets)
    assert "... and 48 more" in text
    assert "routed experts: none" in text
    assert len(text.splitlines()) < 30
