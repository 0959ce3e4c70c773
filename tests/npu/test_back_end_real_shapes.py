"""Whole layers of DeepSeek's real sizes on meta tensors: torch_npu's own shape functions accept every call.

Nothing is computed; the shape functions are torch_npu's, not the bench's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.adapters.device_pages import DevicePages
from runtime.adapters.lora_plan import LoraPlan
from runtime.layers.placement import Placement
from runtime.models.deepseek.attention_batch import AttentionBatch, PrefillSpan
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.model import DecoderLayer
from runtime.ops.latent_cache import DecodeContext
from runtime.ops.npu.ops import NpuOps
from runtime.ops.rotation import Rotation
from tests.npu.real_shapes import EP16, META, V2_LITE, V3, meta_adapter, meta_pages, real_config

OPS = NpuOps()
BLOCK_TOKENS, NUM_BLOCKS = 128, 64
ALWAYS = (
    "npu_grouped_matmul", "npu_moe_gating_top_k", "npu_moe_init_routing_v2", "npu_moe_finalize_routing", "npu_swiglu",
    "npu_add_rms_norm", "npu_interleave_rope", "npu_kv_rmsnorm_rope_cache",
)  # fmt: skip


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "npu":
            self.calls[func._schema.name.removeprefix("npu::")] += 1
        return func(*args, **(kwargs or {}))


def _pages(config: DeepseekConfig, num_adapters: int, leaves: Sequence[str]) -> DevicePages:
    """Adapters of rank 16 on all routed experts, and on some projections of the layer's attention."""
    linears = [f"model.layers.0.self_attn.{leaf}" for leaf in leaves]
    adapter = meta_adapter(config, list(range(config.n_routed_experts)), linears)
    return meta_pages(config, adapter, num_adapters)


def _batch(num_decodes: int, num_prefill: int, num_context: int) -> AttentionBatch:
    num_tokens = num_decodes + num_prefill

    def index(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64, device=META)

    table = torch.zeros(num_decodes, 8, dtype=torch.int32, device=META)
    spans = [PrefillSpan(num_decodes, num_decodes, num_tokens, index(num_context + num_prefill))] if num_prefill else []
    return AttentionBatch(
        positions_T=index(num_tokens),
        write_slots_T=index(num_tokens),
        decode_rows_B=index(num_decodes),
        decode_rows=list(range(num_decodes)),
        decode_context=DecodeContext(table, [700 + row for row in range(num_decodes)], BLOCK_TOKENS),
        prefills=spans,
    )


def _run(
    config: DeepseekConfig,
    num_adapters: int,
    batch: AttentionBatch,
    leaves: Sequence[str] = ("kv_b_proj", "o_proj"),
    *,
    is_loaded: bool = False,
) -> Counter[str]:
    """The operators of one layer, after what follows the loading of its weights if `is_loaded`."""
    placement = Placement(META, torch.bfloat16, OPS)
    layer = DecoderLayer(0, config, placement)
    if is_loaded:
        layer.self_attn.absorb_weights()
    cache = OPS.make_cache(NUM_BLOCKS * BLOCK_TOKENS, BLOCK_TOKENS, (512, 64), torch.bfloat16, META)
    num_tokens, num_decodes = batch.positions_T.shape[0], len(batch.decode_rows)
    x_TH = torch.empty(num_tokens, config.hidden_size, dtype=torch.bfloat16, device=META)
    angles_TF = torch.empty(num_tokens, 32, device=META)
    lora = None
    if num_adapters:
        slots = sorted(row % (num_adapters + 1) - 1 for row in range(num_decodes))
        slots += [num_adapters - 1] * len(batch.prefills)
        counts = [1] * num_decodes + [span.stop - span.start for span in batch.prefills]
        lora = LoraPlan(_pages(config, num_adapters, leaves), OPS, slots, counts, META)
    with torch.inference_mode(), _Counted() as counted:
        out_TH, residual_TH = layer(x_TH, x_TH, Rotation(angles_TF, angles_TF), cache, batch, lora)
    assert out_TH.shape == residual_TH.shape == x_TH.shape and out_TH.dtype is torch.bfloat16
    return counted.calls


@pytest.mark.parametrize("changes", [V3, EP16, V2_LITE], ids=["V3", "V3 EP16", "V2-Lite"])
@pytest.mark.parametrize("num_adapters", [0, 1, 8])
@pytest.mark.parametrize(
    ("num_decodes", "num_prefill", "num_context"), [(32, 0, 0), (3, 200, 0), (1, 200, 3000)], ids=str
)
def test_every_operator_of_a_layer_accepts_its_arguments(
    changes: Mapping[str, Any], num_adapters: int, num_decodes: int, num_prefill: int, num_context: int
) -> None:
    config = real_config(changes)
    calls = _run(config, num_adapters, _batch(num_decodes, num_prefill, num_context))
    assert all(calls[name] for name in ALWAYS), calls
    assert calls["npu_fused_infer_attention_score_v2"] == 1
    assert (calls["npu_fused_infer_attention_score"] > 0) == (num_prefill > 0)
    num_launches = -(-num_adapters * config.n_routed_experts // 1024)
    expert_launches = 2 + 5 * num_launches
    print(f"\n  {dict(calls)}")
    if not num_prefill:
        dense = 2 if num_adapters else 0  # o_proj; kv_b is applied within the absorbed products
        assert calls["npu_grouped_matmul"] == expert_launches + dense


@pytest.mark.parametrize("changes", [V3, EP16, V2_LITE], ids=["V3", "V3 EP16", "V2-Lite"])
@pytest.mark.parametrize("leaves", [(), ("o_proj",), ("q_b_proj",), ("kv_b_proj",)], ids=str)
@pytest.mark.parametrize("num_adapters", [0, 8])
def test_mlas_projections_are_one_operator_where_nothing_is_on_them(
    changes: Mapping[str, Any], leaves: tuple[str, ...], num_adapters: int
) -> None:
    """The shape function is torch_npu's own; for `npu_format_cast` it has none."""
    if changes is V2_LITE and leaves == ("q_b_proj",):
        leaves = ("q_proj",)
    calls = _run(real_config(changes), num_adapters, _batch(128, 0, 0), leaves, is_loaded=True)
    is_adapted = num_adapters > 0 and leaves not in ((), ("o_proj",))
    num_prologs = int(changes is not V2_LITE and not is_adapted)
    assert calls["npu_mla_prolog_v3"] == num_prologs
    assert calls["npu_kv_rmsnorm_rope_cache"] == calls["npu_interleave_rope"] == 1 - num_prologs
    assert calls["npu_fused_infer_attention_score_v2"] == 1
