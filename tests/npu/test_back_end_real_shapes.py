"""Whole layers of DeepSeek's real sizes on meta tensors: torch_npu's own shape functions accept every call.

Nothing is computed; the shape functions are torch_npu's, not the bench's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.adapters.device_pages import DevicePages
from runtime.adapters.host_adapter import HostAdapter
from runtime.adapters.lora_plan import LoraPlan
from runtime.adapters.page_pool import HostPages
from runtime.demo import MODEL_DIR
from runtime.layers.placement import Placement
from runtime.models.deepseek.attention_batch import AttentionBatch, PrefillSpan
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.model import DecoderLayer
from runtime.ops.latent_cache import DecodeContext
from runtime.ops.npu.ops import NpuOps
from runtime.ops.rotation import Rotation

META = torch.device("meta")
OPS = NpuOps()
BLOCK_TOKENS, NUM_BLOCKS = 128, 64
V3: dict[str, Any] = {
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_group": 8, "topk_group": 4,
    "num_experts_per_tok": 8, "num_hidden_layers": 1, "first_k_dense_replace": 0,
}  # fmt: skip
# The share of one of 16 processes: its experts, and groups that its router can have.
EP16: dict[str, Any] = V3 | {"n_routed_experts": 16, "n_group": 1, "topk_group": 1}
V2_LITE: dict[str, Any] = V3 | {
    "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "n_routed_experts": 64, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 6, "n_shared_experts": 2, "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy",
}  # fmt: skip
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


def _config(path: Path, changes: Mapping[str, Any]) -> DeepseekConfig:
    raw = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8")) | dict(changes)
    (path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return DeepseekConfig.from_dir(path)


def _pages(config: DeepseekConfig, num_adapters: int) -> DevicePages:
    """Adapters of rank 16 on all routed experts, and on kv_b and o of the layer."""
    pages = DevicePages(config.n_routed_experts, num_adapters, META)
    hidden, width, rank = config.hidden_size, config.moe_intermediate_size, 16

    def factor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=META)

    experts, num = list(range(config.n_routed_experts)), config.n_routed_experts
    factors = {
        "a13": factor(num, 2 * rank, hidden), "a2": factor(num, rank, width), "b_gate": factor(num, rank, width),
        "b_up": factor(num, rank, width), "b2": factor(num, rank, hidden),
    }  # fmt: skip
    linears = {}
    for name in ("model.layers.0.self_attn.kv_b_proj", "model.layers.0.self_attn.o_proj"):
        num_out, num_in = config.linear_shapes()[name]
        pair = {"a": factor(1, rank, num_in), "b": factor(1, rank, num_out)}
        linears[name] = HostPages(rank, [0], pair, a_rows_first=True)
    adapter = HostAdapter(linears, {0: [HostPages(rank, experts, factors, a_rows_first=True)]})
    for slot in range(num_adapters):
        for _ in pages.install(slot, adapter):
            pass
    return pages


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


def _run(config: DeepseekConfig, num_adapters: int, batch: AttentionBatch) -> Counter[str]:
    placement = Placement(META, torch.bfloat16, OPS)
    layer = DecoderLayer(0, config, placement)
    cache = OPS.make_cache(NUM_BLOCKS * BLOCK_TOKENS, BLOCK_TOKENS, (512, 64), torch.bfloat16, META)
    num_tokens, num_decodes = batch.positions_T.shape[0], len(batch.decode_rows)
    x_TH = torch.empty(num_tokens, config.hidden_size, dtype=torch.bfloat16, device=META)
    angles_TF = torch.empty(num_tokens, 32, device=META)
    lora = None
    if num_adapters:
        slots = sorted(row % (num_adapters + 1) - 1 for row in range(num_decodes))
        slots += [num_adapters - 1] * len(batch.prefills)
        counts = [1] * num_decodes + [span.stop - span.start for span in batch.prefills]
        lora = LoraPlan(_pages(config, num_adapters), OPS, slots, counts, META)
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
    changes: Mapping[str, Any], num_adapters: int, num_decodes: int, num_prefill: int, num_context: int, tmp_path: Path
) -> None:
    config = _config(tmp_path, changes)
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
