"""The causal mask of 2048 x 2048 from which attention operators read the mask of any length."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

COMPRESSED_MASK = 2048


@lru_cache(maxsize=8)
def compressed_causal_mask(device: torch.device) -> Tensor:
    """True above the diagonal; made once for a device."""
    with torch.inference_mode(mode=False):
        return torch.ones(COMPRESSED_MASK, COMPRESSED_MASK, dtype=torch.bool, device=device).triu(1)
