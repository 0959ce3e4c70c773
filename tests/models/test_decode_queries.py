"""Decoding steps without an adapter on MLA's projections go another way through the table, bit for bit the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.demo import MODEL_DIR
from runtime.layers.placement import Placement
from runtime.models.deepseek.attention import MultiHeadLatentAttention
from runtime.models.deepseek.attention_batch import AttentionBatch
from runtime.models.deepseek.config import DeepseekConfig
from runtime.ops.cpu import CpuOps
from runtime.ops.latent_cache import DecodeContext, LatentCache
from runtime.ops.mla_weights import MlaWeights
from runtime.ops.rotation import Rotation

CPU = torch.device("cpu")
LENS, BLOCK_TOKENS = [5, 17, 1], 16


class _CountedOps(CpuOps):
    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def decode_queries(
        self, x_TK: Tensor, weights: MlaWeights, rotation: Rotation, cache: LatentCache, slots_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        self.num_calls += 1
        return super().decode_queries(x_TK, weights, rotation, cache, slots_T)


class _EmptyLora:
    """An adapter that is said to change some modules, and adds nothing."""

    def __init__(self, leaf: str) -> None:
        self.name = f"layer.{leaf}"

    def adapts(self, modules: Sequence[str]) -> bool:
        return self.name in modules

    def add_linear_(self, module: str, y_TN: Tensor, x_TK: Tensor) -> None:
        pass

    def factors_of_rows(self, module: str, rows: list[int]) -> list[tuple[slice, Tensor, Tensor]]:
        return []


def _attention(
    folder: Path, changes: dict[str, Any], dtype: torch.dtype
) -> tuple[MultiHeadLatentAttention, _CountedOps]:
    raw = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    config, ops = DeepseekConfig.from_dir(folder), _CountedOps()
    renamed = {"layer" + name.removeprefix("model.layers.0.self_attn"): shape
               for name, shape in config.linear_shapes().items()}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepseekConfig, "linear_shapes", lambda _: renamed)
        attention = MultiHeadLatentAttention("layer", config, Placement(CPU, dtype, ops))
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(drawn * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.1 * drawn)
    attention.absorb_weights()
    return attention, ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}], ids=["with a query latent", "without"])
def test_a_decoding_step_gives_the_same_bits_both_ways(
    changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    attention, ops = _attention(tmp_path, changes, dtype)
    table = torch.tensor([[1, 0], [2, 3], [4, 0]], dtype=torch.int32)
    slots_T = torch.tensor([16 + 4, 48, 64])
    context = DecodeContext(table, LENS, BLOCK_TOKENS)
    batch = AttentionBatch(torch.tensor(LENS) - 1, slots_T, torch.arange(3), [0, 1, 2], context, [])
    generator = torch.Generator().manual_seed(1)
    x_TK = torch.randn(3, attention.o_proj.weight.shape[0], generator=generator).to(dtype)
    angles_TF = torch.rand(3, 16, generator=generator)
    latents, keys = torch.randn(80, 96, generator=generator), torch.randn(80, 32, generator=generator)

    def run(lora: Any) -> tuple[Tensor, list[Tensor]]:
        cache = ops.make_cache(80, BLOCK_TOKENS, (96, 32), dtype, CPU)
        cache.write_(torch.arange(80), latents.to(dtype), keys.to(dtype))
        with torch.inference_mode():
            out = attention(x_TK, Rotation(angles_TF.cos(), angles_TF.sin()), cache, batch, lora)
        return out, cache.tensors

    expected, expected_cache = run(_EmptyLora("kv_a_proj_with_mqa"))
    assert ops.num_calls == 0 and not expected.isnan().any()
    for lora in (None, _EmptyLora("o_proj")):
        out, cache = run(lora)
        assert torch.equal(out, expected)
        assert all(torch.equal(*pair) for pair in zip(cache, expected_cache, strict=True))
    assert ops.num_calls == 2
    for leaf in ("q_a_proj", "q_b_proj") if attention.has_query_latent else ("q_proj",):
        run(_EmptyLora(leaf))
    run(_EmptyLora("kv_b_proj"))
    assert ops.num_calls == 2
