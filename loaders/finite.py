"""Values that are not numbers, found without a temporary of the tensor's size."""

import math
from collections.abc import Iterator, Mapping

import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor an infinity."""
    return tensor.numel() == 0 or all(math.isfinite(end) for end in _ends(tensor))


def non_finite(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """A sentence for each tensor that holds NaN or an infinity."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            kind = "NaN" if any(map(math.isnan, _ends(tensor))) else "infinite values"
            yield f"{name}: contains {kind}"


def _ends(tensor: torch.Tensor) -> tuple[float, float]:
    """The least and the greatest number; both are NaN if one is."""
    low, high = torch.aminmax(tensor)
    return float(low), float(high)
