"""Values that are not numbers, found without a temporary of the tensor's size."""

import math
from collections.abc import Iterator, Mapping

import torch


def non_finite(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """A sentence for each tensor that holds NaN or an infinity."""
    for name, tensor in _suspects(tensors):
        low, high = (end.item() for end in torch.aminmax(tensor))
        if math.isnan(low) or math.isnan(high):
            yield f"{name}: contains NaN"
        elif math.isinf(low) or math.isinf(high):
            yield f"{name}: contains infinite values"


def _suspects(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """What is left to look at: many small tensors of one type that fill a piece of memory are seen in one go."""
    groups: dict[tuple[int, torch.dtype], list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            groups.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append((name, tensor))
    for group in groups.values():
        first = group[0][1]
        storage = first.untyped_storage()
        if len(group) == 1 or sum(tensor.nbytes for _, tensor in group) != storage.nbytes():
            yield from group
            continue
        low, high = torch.aminmax(torch.empty(0, dtype=first.dtype).set_(storage))
        if not (math.isfinite(low) and math.isfinite(high)):
            yield from group
