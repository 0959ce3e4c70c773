"""A list of what a piece of code launches on the device, with the bytes and operations of each launch.

`with record() as launches:` lists the npu operators, on CPU tensors (which then also run) and on meta tensors alike;
`record(all_operators=True)` adds PyTorch's own operators, without views and bare allocations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tests.npu.bench.registry import tensors_in
from tests.npu.bench.traffic import TRAFFIC, TRAFFIC_OF_PYTORCH, Traffic, num_bytes

# Operators that start nothing on the device, though their schemas do not say that they give views.
WITHOUT_LAUNCH = (
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "detach_", "lift_fresh",
    "_unsafe_view",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch: `inputs` are (shape, dtype) of its tensors in order; the operations count a multiply-add as two."""

    operator: str
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    bytes_read: int
    bytes_written: int
    flops: int


@contextmanager
def record(*, all_operators: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches of the block, in order."""
    recorder = _Recorder(all_operators)
    with recorder:
        yield recorder.launches


class _Recorder(TorchDispatchMode):
    def __init__(self, all_operators: bool) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._all_operators = all_operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):
            # Under inference mode these arrive whole; what they are made of is what the device runs.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        is_npu = func.namespace == "npu"
        if is_npu or (self._all_operators and _launches(func)):
            arguments = _by_name(func, args, kwargs)
            self.launches.append(_launch(func, is_npu, arguments, out))
        return out


def _is_composite(func: Any) -> bool:
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


def _launches(func: Any) -> bool:
    views = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
    return not views and func._schema.name.split("::")[1] not in WITHOUT_LAUNCH


def _by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the schema with their values, defaults included."""
    named = {argument.name: argument.default_value for argument in func._schema.arguments}
    named.update(zip(named, args, strict=False))
    return named | kwargs


def _launch(func: Any, is_npu: bool, arguments: dict[str, Any], out: Any) -> Launch:
    namespace, name = func._schema.name.split("::")
    tensors: list[Tensor] = list(tensors_in(arguments))
    inputs = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    rules = TRAFFIC if is_npu else TRAFFIC_OF_PYTORCH
    if name in rules:
        traffic = rules[name](arguments, out)
    else:
        traffic = Traffic(num_bytes(tensors), num_bytes(list(tensors_in(out))), 0)
    flops = traffic.flops
    if not is_npu and func.overloadpacket in flop_registry:
        flops = flop_registry[func.overloadpacket](*arguments.values(), out_val=out)
    return Launch(name if is_npu else f"{namespace}.{name}", inputs, traffic.read, traffic.written, flops)
