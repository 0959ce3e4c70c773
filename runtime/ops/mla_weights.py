"""What latent attention multiplies its input by before it attends.

Shape suffixes: K hidden, R query latent, H heads, N and D a query's parts without and with rotation, C latent of keys
and values, X = C + D, O = H (N + D).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class QueryLatent:
    """The query's own latent, which V2-Lite has not: its projection q_a, and the weight of its norm."""

    down_RK: Tensor
    norm_R: Tensor


@dataclass(frozen=True)
class MlaWeights:
    """q_a, q_b (q_proj without a latent, [O, K]), kv_a, and the key half of kv_b head by head; the norms' weights."""

    query_latent: QueryLatent | None
    query_up_OR: Tensor
    key_up_HNC: Tensor
    kv_down_XK: Tensor
    kv_norm_C: Tensor
    eps: float
