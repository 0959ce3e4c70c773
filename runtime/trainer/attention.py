"""Latent attention in training: no cache, keys and values expanded, every document of a packed row by itself.

Shape suffixes: T tokens, H heads of this process, N nope width, D rope width, V value width, Q = N + D, C latent width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from runtime.distributed.collectives import enter_parallel, leave_parallel
from runtime.distributed.mesh import Group
from runtime.layers.norm import RmsNorm
from runtime.layers.placement import Placement
from runtime.models.deepseek.attention import LATENT_NORM_EPS
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.rope import softmax_scale
from runtime.ops.base import Ops
from runtime.ops.rotation import Rotation
from runtime.trainer.lora import LoraParallelLinear, LoraSpec, Split
from runtime.trainer.micro_batch import DocumentBucket, Documents, MicroBatch
from runtime.trainer.norm import frozen_rms_norm

_SPLITS = {"q_proj": Split.COLUMN, "q_b_proj": Split.COLUMN, "kv_b_proj": Split.COLUMN, "o_proj": Split.ROW}


class TrainingAttention(nn.Module):
    """The weights of `MultiHeadLatentAttention`, split by heads over tp; its readable form, with gradients."""

    def __init__(
        self, name: str, config: DeepseekConfig, placement: Placement, tp: Group, specs: Mapping[str, LoraSpec]
    ) -> None:
        super().__init__()
        self.tp, self.ops, self.scale = tp, placement.ops, softmax_scale(config)
        self.num_heads = config.num_attention_heads // tp.size
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.num_latent = config.kv_lora_rank
        shapes = config.linear_shapes()

        def projection(leaf: str) -> LoraParallelLinear:
            full = f"{name}.{leaf}"
            split = _SPLITS.get(leaf, Split.NONE)
            return LoraParallelLinear(full, shapes[full], split, placement, tp, specs.get(full))

        self.has_query_latent = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = projection("q_proj")
        else:
            self.q_a_proj = projection("q_a_proj")
            self.q_a_layernorm = RmsNorm(config.q_lora_rank, LATENT_NORM_EPS, placement)
            self.q_b_proj = projection("q_b_proj")
        self.kv_a_proj_with_mqa = projection("kv_a_proj_with_mqa")
        self.kv_a_layernorm = RmsNorm(config.kv_lora_rank, LATENT_NORM_EPS, placement)
        self.kv_b_proj = projection("kv_b_proj")
        self.o_proj = projection("o_proj")

    def forward(self, x_TK: Tensor, rotation: Rotation, batch: MicroBatch) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        query_nope, query_rope = self._queries(x_TK, batch.ids_T).split((self.nope, self.rope), dim=-1)
        query_rope = self.ops.rotate_interleaved(query_rope, rotation)
        compressed = self.kv_a_proj_with_mqa(x_TK, batch.ids_T)
        latent_TC, key_rope = compressed.split((self.num_latent, self.rope), dim=-1)
        latent_TC = enter_parallel(frozen_rms_norm(latent_TC, self.kv_a_layernorm), self.tp)
        key_rope = enter_parallel(self.ops.rotate_interleaved(key_rope, rotation), self.tp)
        expanded = self.kv_b_proj(latent_TC, batch.ids_T).view(-1, self.num_heads, self.nope + self.value)
        key_nope, value_THV = expanded.split((self.nope, self.value), dim=-1)
        key_rope = key_rope[:, None].expand(-1, self.num_heads, -1)
        queries, keys = (query_nope, query_rope), (key_nope, key_rope)
        out_THV = _attend(self.ops, queries, keys, value_THV, batch.documents, self.scale)
        return leave_parallel(self.o_proj(out_THV.flatten(1), batch.ids_T), self.tp)

    def _queries(self, x_TK: Tensor, ids_T: Tensor) -> Tensor:
        if self.has_query_latent:
            latent = frozen_rms_norm(self.q_a_proj(x_TK, ids_T), self.q_a_layernorm)
            query: Tensor = self.q_b_proj(enter_parallel(latent, self.tp), ids_T)
        else:
            query = self.q_proj(enter_parallel(x_TK, self.tp), ids_T)
        return query.view(-1, self.num_heads, self.nope + self.rope)


def _attend(
    ops: Ops,
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    value_THV: Tensor,
    documents: Documents,
    scale: float,
) -> Tensor:
    """Causal attention within each document, [T, H, V]; queries and keys without and with rotation."""
    outputs = []
    for bucket in documents.buckets:
        # Joined where heads come before tokens already, so that nothing is laid out anew after it.
        query, key = (torch.cat([_by_document(x, bucket) for x in parts], dim=-1) for parts in (queries, keys))
        out = ops.attention(query, key, _by_document(value_THV, bucket), scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if documents.slot_T is None:
        return outputs[0]
    return torch.cat(outputs).index_select(0, documents.slot_T)


def _by_document(x_THW: Tensor, bucket: DocumentBucket) -> Tensor:
    """[documents, H, tokens, W]."""
    rows: Tensor = x_THW if bucket.rows_N is None else x_THW.index_select(0, bucket.rows_N)
    by_document: Tensor = rows.unflatten(0, (bucket.num_documents, bucket.num_tokens)).transpose(1, 2)
    return by_document
