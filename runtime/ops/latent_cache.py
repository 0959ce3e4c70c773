"""The latent KV cache of one layer, and where the decoding sequences of one step find their context in it.

Shape suffixes: S cache slots, C latent width, D rope width, X = C + D, T tokens, B sequences, N blocks of the longest
sequence, L tokens of the longest context.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentCache:
    """Normed latents and rotated key parts of all slots; slot = block x `block_tokens` + offset.

    `joint_SX` holds both where a back-end keeps them in one row a slot; the other two are views of it then.
    """

    latent_SC: Tensor
    rope_SD: Tensor
    block_tokens: int
    joint_SX: Tensor | None = None

    @classmethod
    def joint(
        cls, num_slots: int, block_tokens: int, widths: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> LatentCache:
        """Zeros, one row a slot; `widths` are C and D."""
        rows_SX = torch.zeros(num_slots, sum(widths), dtype=dtype, device=device)
        latent_SC, rope_SD = rows_SX.split(widths, dim=1)
        return cls(latent_SC, rope_SD, block_tokens, rows_SX)

    @classmethod
    def apart(
        cls, num_slots: int, block_tokens: int, widths: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> LatentCache:
        """Zeros, two contiguous tensors; `widths` are C and D."""
        latent_SC, rope_SD = (torch.zeros(num_slots, width, dtype=dtype, device=device) for width in widths)
        return cls(latent_SC, rope_SD, block_tokens)

    @property
    def tensors(self) -> list[Tensor]:
        """What holds the memory."""
        return [self.latent_SC, self.rope_SD] if self.joint_SX is None else [self.joint_SX]

    def write_(self, slots_T: Tensor, latent_TC: Tensor, rope_TD: Tensor) -> None:
        """Put tokens' rows into their slots."""
        if self.joint_SX is not None:
            self.joint_SX.index_copy_(0, slots_T, torch.cat((latent_TC, rope_TD), dim=-1))
        else:
            self.latent_SC.index_copy_(0, slots_T, latent_TC)
            self.rope_SD.index_copy_(0, slots_T, rope_TD)

    def read(self, slots_L: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [L, C] and key parts [L, D] of some slots."""
        if self.joint_SX is not None:
            latent_LC, rope_LD = self.joint_SX.index_select(0, slots_L).split(self._widths, dim=-1)
            return latent_LC, rope_LD
        return self.latent_SC.index_select(0, slots_L), self.rope_SD.index_select(0, slots_L)

    def read_joint(self, slots_L: Tensor) -> Tensor:
        """Rows [L, X] of some slots: the latent, then the key part."""
        if self.joint_SX is not None:
            return self.joint_SX.index_select(0, slots_L)
        return torch.cat(self.read(slots_L), dim=-1)

    @property
    def _widths(self) -> tuple[int, int]:
        return self.latent_SC.shape[1], self.rope_SD.shape[1]


@dataclass(frozen=True)
class DecodeContext:
    """The contexts of a step's decoding sequences, their new token included.

    `block_table_BN` (int32) holds each sequence's blocks, padded with block 0; `lens` the context lengths on the host.
    What a back-end does not ask for is not computed, and nothing is computed twice in a step.
    """

    block_table_BN: Tensor
    lens: list[int]
    block_tokens: int

    @property
    def is_padded(self) -> bool:
        """Whether the lengths differ."""
        return min(self.lens, default=0) < max(self.lens, default=0)

    @cached_property
    def lens_B(self) -> Tensor:
        """The context lengths, int64 on the device."""
        return torch.tensor(self.lens, dtype=torch.int64, device=self.block_table_BN.device)

    @cached_property
    def slots_BL(self) -> Tensor:
        """The cache slot of every token of every context, int64, those past a sequence's end to be masked."""
        offsets = torch.arange(self.block_tokens, device=self.block_table_BN.device)
        slots_BNO = self.block_table_BN.long()[..., None] * self.block_tokens + offsets
        return slots_BNO.flatten(1)[:, : max(self.lens, default=0)]
