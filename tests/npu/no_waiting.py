"""A mode in which whatever would make the host wait for the device raises; inside operators anything goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

REFUSED = (
    "aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero_numpy", "aten::_unique2", "aten::_unique",
    "aten::unique_consecutive", "aten::unique_dim", "aten::bincount", "aten::masked_select",
    "aten::repeat_interleave.Tensor", "aten::is_nonzero", "aten::equal", "aten::histc", "aten::argwhere",
)  # fmt: skip


class WaitsForDevice(AssertionError):
    """An operation whose result the host, or the size of another tensor, depends on."""


class _NoWaiting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num_seen = 0
        self.is_inside = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
        if name.startswith(REFUSED) or (name.startswith("aten::index") and _has_bool_index(args)):
            raise WaitsForDevice(name)
        self.num_seen += 1
        self.is_inside = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.is_inside = False


def _has_bool_index(args: Sequence[Any]) -> bool:
    indices = [item for argument in args if isinstance(argument, list | tuple) for item in argument]
    return any(isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) for item in indices)


@contextmanager
def no_waiting() -> Iterator[_NoWaiting]:
    """Refuse operations that wait for the device, `tolist`, `numpy` and `cpu` among them; counts what it saw."""
    mode = _NoWaiting()

    def refuse(name: str) -> Any:
        plain = getattr(Tensor, name)

        def checked(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not mode.is_inside:
                raise WaitsForDevice(f"Tensor.{name}")
            return plain(tensor, *args, **kwargs)

        return patch.object(Tensor, name, checked)

    with refuse("tolist"), refuse("numpy"), refuse("cpu"), mode:
        yield mode
