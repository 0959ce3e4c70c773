"""The table of device operations: everything that a back-end may do better than plain PyTorch.

Shape suffixes: T tokens, E experts of a router or choices of a token, M routed rows, G groups or keys, P pages, K and N
matrix sides, R LoRA rank, B sequences, H heads, C latent width (kv_lora_rank), D rope width, X = C + D, L tokens of a
context, S cache slots; a group's weight [K, N] is stored as J panels of W columns each, N = J W. In attention N, D and
V are the widths of a head's key part without and with rotation, and of its value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from runtime import env
from runtime.ops import reference, reference_routing
from runtime.ops.frozen_groups import FrozenGroups, PlainGroups
from runtime.ops.latent_cache import DecodeContext, LatentCache
from runtime.ops.lora_rows import LoraRows
from runtime.ops.mla_weights import MlaWeights
from runtime.ops.rotation import Rotation
from runtime.ops.routing import RoutingRule, SortedRows

T = TypeVar("T")


class Ops(ABC):
    """Operations of one device. What a back-end does not override runs as the reference does.

    `lora_rank_multiple`: ranks of grouped products must be multiples of it; whoever calls them pads with zeros.
    `max_block_numbers`: bound on the numbers of one block of a prefill, which is as many keys and values as it expands,
    or, where the back-end `holds_scores`, the scores if those are more.
    `routed_row_multiple`: training fills each expert's rows up to a multiple of it.
    `max_copy_bytes`: most bytes of adapters that are copied between two steps, so that no step waits for long.
    `core_share`: where steps compute on the host's cores, as much of a step's time is left to the reading of adapters.
    `lora_a_rows_first`: A is best stored as [P, R, K], of which `lora_add_` is given the transposed view.
    """

    lora_rank_multiple = 1
    max_block_numbers = 2**23
    holds_scores = True
    lora_a_rows_first = False
    routed_row_multiple = 1
    max_copy_bytes = 64 * 2**20
    core_share = 0.0

    def shares(self, counts_G: Tensor) -> list[tuple[slice, slice]]:
        """(groups, rows) of the parts that `side_by_side` gains by; all in one has rows to the end, None."""
        return [(slice(0, len(counts_G)), slice(0, None))]

    def side_by_side(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """The results of independent tasks without gradients, at the same time where the device gains by it."""
        return [task() for task in tasks]

    def panel_columns(self, num_columns: int, num_parts: int = 1) -> int:
        """Columns W of one panel of a grouped weight: all of them, unless a device gains by less.

        A weight of several equal parts (gate and up) has one panel, or panels that each lie in one part.
        """
        return num_columns

    def pack_linear(self, weight_NK: Tensor) -> Tensor:
        """A weight as `linear` multiplies by it fastest: itself, or an opaque copy that replaces it after loading."""
        return weight_NK

    def linear(self, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        """x W^T, with a weight that `pack_linear` has seen or not."""
        return torch.nn.functional.linear(x_TK, weight_NK)

    @abstractmethod
    def grouped_matmul(self, x_MK: Tensor, weight_GJKW: Tensor, counts_G: Tensor) -> Tensor:
        """Rows in order; group g's `counts_G[g]` rows are multiplied by its weight. Counts sum to M. No gradient.

        A weight of one panel may be a transposed view.
        """

    def grouped_matmul_add_(self, y_MN: Tensor, x_MK: Tensor, weight_GJKW: Tensor, counts_G: Tensor) -> None:
        """Add a grouped product to `y`."""
        y_MN += self.grouped_matmul(x_MK, weight_GJKW, counts_G)

    def pack_groups(self, weight_GNK: Tensor) -> FrozenGroups:
        """Weights as products in both directions are fastest; the copies may take twice their memory."""
        return PlainGroups(weight_GNK, self)

    @abstractmethod
    def grouped_outer(self, x_MK: Tensor, y_MN: Tensor, counts_G: Tensor) -> Tensor:
        """The grouped product along the rows, float32 [G, K, N]: each group's x^T y, zeros for a group without rows.

        Sums are float32's; of 16-bit operands a device may round them to 16 bits once.
        """

    @abstractmethod
    def lora_add_(self, y_MN: Tensor, x_MK: Tensor, a_PKR: Tensor, bs_PRN: Sequence[Tensor], lora: LoraRows) -> None:
        """Add each row's LoRA delta: `y[m] += (x[m] @ a[p]) @ b[p]` with p the row's page; no page adds nothing.

        Rows of one page are contiguous and pages ascend along the rows that have one. Several `bs` split the
        columns of `y` and of `a` into equal parts, one for each (gate and up share one shrink). `bs` are finite, since
        rows without a page may be multiplied as zeros.
        """

    def choose_experts(self, logits_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor]:
        """Weights [T, K] float32 and experts [T, K] (int32 or int64, in any order) of each token, from float32 logits.

        The bias steers the choice only; weights come from the scores. Without gradients.
        """
        return reference_routing.choose_experts(logits_TE, bias_E, rule)

    def sort_rows(self, x_TH: Tensor, keys_TK: Tensor, num_keys: int) -> SortedRows:
        """Each token's row once for each of its K choices, sorted by key, 0 <= key < num_keys; stable."""
        return reference_routing.sort_rows(x_TH, keys_TK, num_keys)

    def combine_experts(self, y_MN: Tensor, rows: SortedRows, weights_TE: Tensor) -> Tensor:
        """Each token's weighted sum over its E choices' rows, [T, N], summed in float32 in the order of its choice.

        Row m of `y` belongs to sorted row m of `rows`, so a token's sum does not depend on how its neighbours' rows
        were sorted. `weights_TE` are float32; an operator may want them in the rows' dtype.
        """
        return reference.combine_experts(y_MN, rows, weights_TE)

    def sum_rows(self, y_MN: Tensor, places_TE: Tensor) -> Tensor:
        """Each token's sum over E rows of `y`, [T, N], in float32 and rounded once."""
        return reference.sum_rows(y_MN, places_TE)

    def rms_norm(self, x_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last axis, computed in float32."""
        return reference.rms_norm(x_TN, weight_N, eps)

    def add_rms_norm(
        self, x_TN: Tensor, residual_TN: Tensor, weight_N: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The norm of residual + x, and that sum. Without gradients."""
        return reference.add_rms_norm(x_TN, residual_TN, weight_N, eps)

    def swiglu(self, x_T2N: Tensor) -> Tensor:
        """silu(first half) * second half of the last axis."""
        return reference.swiglu(x_T2N)

    def swiglu_backward(self, x_T2N: Tensor, grad_TN: Tensor) -> Tensor:
        """The gradient [T, 2N] of `swiglu`'s input for that of its value."""
        return reference.swiglu_backward(x_T2N, grad_TN)

    def attention(self, query_DHLX: Tensor, key_DHLX: Tensor, value_DHLV: Tensor, scale: float) -> Tensor:
        """Causal attention with gradients within each of D documents of L tokens: [D, H, L, V]."""
        return reference.attention(query_DHLX, key_DHLX, value_DHLV, scale)

    def rotate_interleaved(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Rotate the pairs (even, odd) of the last axis of x [T, .., D]; the result is written as two halves.

        Queries and keys go through the same permutation, so their products equal those of any other layout.
        Differentiable.
        """
        return reference.rotate_interleaved(x, rotation)

    def make_cache(
        self, num_slots: int, block_tokens: int, widths: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> LatentCache:
        """One layer's cache, zeros; `num_slots` are whole blocks, `widths` the latent's and the rope part's."""
        return LatentCache.joint(num_slots, block_tokens, widths, dtype, device)

    def write_latents(
        self,
        cache: LatentCache,
        kv_TX: Tensor,
        norm_weight_C: Tensor,
        eps: float,
        rotation: Rotation,
        slots_T: Tensor,
    ) -> None:
        """Norm each row's latent, rotate its key part, and write both into its slot, int64, no slot twice."""
        reference.write_latents(cache, kv_TX, norm_weight_C, eps, rotation, slots_T)

    def pack_mla(self, weights: MlaWeights) -> MlaWeights:
        """Weights as `decode_queries` multiplies by them fastest; they replace those that were loaded.

        Their shapes stay, and `linear` takes them.
        """
        return weights

    def decode_queries(
        self, x_TK: Tensor, weights: MlaWeights, rotation: Rotation, cache: LatentCache, slots_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All that MLA does with its input x before it decodes, where no LoRA takes part.

        Writes each row's latent and key part into its slot, int64, no slot twice, and returns the queries of
        `mla_decode`: absorbed [T, H, C] and rotated [T, H, D].
        """
        query = x_TK
        if weights.query_latent is not None:
            latent = weights.query_latent
            query = self.rms_norm(self.linear(x_TK, latent.down_RK), latent.norm_R, weights.eps)
        num_heads, num_nope, _ = weights.key_up_HNC.shape
        query_THX = self.linear(query, weights.query_up_OR).view(x_TK.shape[0], num_heads, -1)
        query_THN, query_THD = query_THX[..., :num_nope], query_THX[..., num_nope:]
        query_THD = self.rotate_interleaved(query_THD, rotation)
        kv_TX = self.linear(x_TK, weights.kv_down_XK)
        self.write_latents(cache, kv_TX, weights.kv_norm_C, weights.eps, rotation, slots_T)
        query_HTC = torch.bmm(query_THN.transpose(0, 1), weights.key_up_HNC)
        return query_HTC.transpose(0, 1).contiguous(), query_THD

    def mla_decode(
        self, query_BHC: Tensor, query_BHD: Tensor, cache: LatentCache, context: DecodeContext, scale: float
    ) -> Tensor:
        """Absorbed MLA for one query a sequence, in its two parts. Returns the weighted latents [B, H, C]."""
        return reference.mla_decode(query_BHC, query_BHD, cache, context, scale)

    def attend_block(
        self,
        query_THN: Tensor,
        query_THD: Tensor,
        key_LHN: Tensor,
        key_LD: Tensor,
        value_LHV: Tensor,
        scale: float,
        *,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attention over one block of keys: output [T, H, V] and log-sum-exp [T, H], both float32.

        `causal`: the keys are those of the T queries themselves, and query t sees keys 0..t. All heads share `key_LD`.
        """
        return reference.attend_block(query_THN, query_THD, key_LHN, key_LD, value_LHV, scale, causal=causal)


def make_ops(device: torch.device) -> Ops:
    """The back-end of a device; an absent device library costs nothing until it is asked for."""
    if device.type == "cpu":
        from runtime.ops.cpu import CpuOps

        return CpuOps()
    if device.type == "cuda":
        from runtime.ops.cuda.ops import CudaOps

        return CudaOps()
    if device.type == "npu":
        from runtime.ops.npu.ops import NpuOps

        return NpuOps(mla_prolog=env.allows_mla_prolog())
    raise ValueError(f"device = {device.type!r} has no back-end here: use cpu, cuda or npu")
