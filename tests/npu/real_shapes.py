"""DeepSeek's real sizes on meta tensors: configurations, adapters and their pages, of which nothing is in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.adapters.device_pages import DevicePages
from runtime.adapters.host_adapter import HostAdapter
from runtime.adapters.page_pool import HostPages
from runtime.demo import MODEL_DIR
from runtime.models.deepseek.config import DeepseekConfig

META = torch.device("meta")
LORA_RANK = 16
V3: dict[str, Any] = {
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_group": 8, "topk_group": 4,
    "num_experts_per_tok": 8, "num_hidden_layers": 1, "first_k_dense_replace": 0,
    "vocab_size": 129280,
}  # fmt: skip
# The share of one of 16 processes: its experts, and groups that its router can have.
EP16: dict[str, Any] = V3 | {"n_routed_experts": 16, "n_group": 1, "topk_group": 1}
V2_LITE: dict[str, Any] = V3 | {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "n_routed_experts": 64, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 6, "n_shared_experts": 2, "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy",
}  # fmt: skip


def real_config(changes: Mapping[str, Any]) -> DeepseekConfig:
    """The demo's configuration with changes; one of the dicts above makes it a released model's."""
    raw = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8")) | dict(changes)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        return DeepseekConfig.from_dir(Path(folder))


def meta_adapter(config: DeepseekConfig, experts: Sequence[int], linears: Sequence[str] = ()) -> HostAdapter:
    """Rank 16 on some routed experts of every routed layer, and on linear modules by name."""
    layers = range(config.first_k_dense_replace, config.num_hidden_layers)
    return HostAdapter(
        {name: _linear_pages(config, name) for name in linears},
        {layer: [_expert_pages(config, list(experts))] for layer in layers},
    )


def meta_pages(config: DeepseekConfig, adapter: HostAdapter, num_adapters: int) -> DevicePages:
    """The same adapter in as many device slots."""
    pages = DevicePages(config.n_routed_experts, max(1, num_adapters), META)
    for slot in range(num_adapters):
        for _ in pages.install(slot, adapter):
            pass
    for _ in pages.compact():  # as they lie when no adapter has come for a while
        pass
    return pages


def _expert_pages(config: DeepseekConfig, experts: list[int]) -> HostPages:
    hidden, width, num = config.hidden_size, config.moe_intermediate_size, len(experts)
    factors = {
        "a13": _factor(num, 2 * LORA_RANK, hidden), "a2": _factor(num, LORA_RANK, width),
        "b_gate": _factor(num, LORA_RANK, width), "b_up": _factor(num, LORA_RANK, width),
        "b2": _factor(num, LORA_RANK, hidden),
    }  # fmt: skip
    return HostPages(LORA_RANK, experts, factors, a_rows_first=True)


def _linear_pages(config: DeepseekConfig, name: str) -> HostPages:
    num_out, num_in = config.linear_shapes()[name]
    pair = {"a": _factor(1, LORA_RANK, num_in), "b": _factor(1, LORA_RANK, num_out)}
    return HostPages(LORA_RANK, [0], pair, a_rows_first=True)


def _factor(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META)
