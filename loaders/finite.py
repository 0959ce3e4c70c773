"""Values that are not numbers, found without a temporary of the tensor's size."""

import math
from collections.abc import Iterator, Mapping

import torch


def non_finite(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """A sentence for each tensor that holds NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        low, high = (end.item() for end in torch.aminmax(tensor))
        if math.isnan(low) or math.isnan(high):
            yield f"{name}: contains NaN"
        elif math.isinf(low) or math.isinf(high):
            yield f"{name}: contains infinite values"
