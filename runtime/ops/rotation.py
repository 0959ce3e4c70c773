"""The rotary angles of one step's tokens, and the forms that back-ends want them in.

Shape suffixes: T tokens, D rope width, F = D / 2 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """cos and sin of every token's angles, float32 [T, F]."""

    cos_TF: Tensor
    sin_TF: Tensor
    _wide: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def wide(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D] in a dtype, both halves alike; made once a step."""
        if dtype not in self._wide:
            cos_TD, sin_TD = (torch.cat((x, x), dim=-1).to(dtype) for x in (self.cos_TF, self.sin_TF))
            self._wide[dtype] = (cos_TD, sin_TD)
        return self._wide[dtype]
