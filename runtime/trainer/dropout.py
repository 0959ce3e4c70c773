"""LoRA dropout whose masks follow from what is dropped, not from who drops it: equal in every layout, on every device.

A mask bit is a hash of the run's seed, the module, the token's place in the run and the column, so a recomputed
forward, another micro-batch size or another number of processes drops the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = 24
# Odd constants of splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit numbers.
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_GOLDEN = -0x61C8864680B583EB


@dataclass(frozen=True)
class Dropout:
    """Drops inputs of one module's A with probability `p`; `key` is the module's own."""

    p: float
    key: int

    def scaled_mask(self, ids_M: Tensor, num_columns: int, first_column: int, dtype: torch.dtype) -> Tensor:
        """[M, columns]: 0 where dropped, 1 / (1 - p) elsewhere. `ids_M` int64: the rows' places in the run."""
        columns_K = torch.arange(first_column, first_column + num_columns, device=ids_M.device)
        rows_M = _mixed(ids_M * _GOLDEN + self.key)
        bits_MK = _mixed(rows_M[:, None] + columns_K * _GOLDEN) & ((1 << _BITS) - 1)
        keep_MK = bits_MK >= int(self.p * (1 << _BITS))
        return keep_MK.to(dtype).mul_(1 / (1 - self.p))


def make_dropout(p: float, seed: int, module: str) -> Dropout | None:
    """The dropout of a module, None if nothing is dropped."""
    if not p:
        return None
    digest = hashlib.sha256(f"dropout:{seed}:{module}".encode()).digest()
    return Dropout(p, int.from_bytes(digest[:8], "little", signed=True))


def _mixed(x: Tensor) -> Tensor:
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))
