"""The kernels under their operators' names, their registration with torch's dispatcher, and how often each ran.

An operator has two entries: CPU runs the kernel; AutogradCPU stands in for torch_npu's autograd formulas, which are
registered for its own device only. An operator without a derivative refuses inputs that require a gradient (on the
device the backward pass would silently give nothing); one with a derivative gets that of its plain formula.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.npu.bench.limits import is_on_host, refuse

Function = Callable[..., Any]


@dataclass(frozen=True)
class Kernel:
    """`run`: the CPU kernel; `formula`: what to differentiate, None for an operator without a derivative.

    `on_meta`: it takes the place of a shape function, which torch_npu lacks.
    """

    name: str
    run: Function
    formula: Function | None = None
    on_meta: bool = False


KERNELS: dict[str, Kernel] = {}
calls: Counter[str] = Counter()
_libraries: list[torch.library.Library] = []


def kernel(name: str, *, formula: Function | None = None, on_meta: bool = False) -> Callable[[Function], Function]:
    """Enter the decorated function as the kernel of `npu::name`; an overload is written `name.Overload`.

    `formula` takes the operator's arguments and returns its first output, the only one with a gradient.
    """

    def enter(run: Function) -> Function:
        if name in KERNELS:
            raise ValueError(f"the bench has two kernels for {name}")
        KERNELS[name] = Kernel(name, run, formula, on_meta)
        return run

    return enter


def register_all() -> None:
    """Register every kernel entered so far, once; torch_npu must be imported, since its schemas are the names."""
    if _libraries:
        return
    library = torch.library.Library("npu", "IMPL")
    _libraries.append(library)
    for entry in KERNELS.values():
        library.impl(entry.name, partial(_run, entry), "CPU")
        library.impl(entry.name, partial(_run_with_autograd, entry), "AutogradCPU")
        if entry.on_meta:
            library.impl(entry.name, entry.run, "Meta")


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors of an argument or result, those in lists too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))


def _run(entry: Kernel, *args: object, **kwargs: object) -> object:
    if any(is_on_host(tensor) for tensor in tensors_in([args, kwargs])):
        refuse(entry.name, "a tensor's memory", "host", "all tensors must lie on the device")
    calls[entry.name] += 1
    return entry.run(*args, **kwargs)


def _operator(name: str) -> Function:
    packet, _, overload = name.partition(".")
    found: Function = getattr(getattr(torch.ops.npu, packet), overload or "default")
    return found


def _run_with_autograd(entry: Kernel, *args: Any, **kwargs: Any) -> object:
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in([args, kwargs]))
    if wanted and entry.formula is None:
        refuse(entry.name, "requires_grad", True,
               "the operator has no derivative: wrap it in a torch.autograd.Function")
    if wanted:
        return _differentiate(entry, args, kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(entry.name)(*args, **kwargs)


def _differentiate(entry: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    positions = {id(tensor): index for index, tensor in enumerate(tensors)}

    def rebuilt(inputs: tuple[Tensor, ...]) -> tuple[list[Any], dict[str, Any]]:
        def swap(value: Any) -> Any:
            return inputs[positions[id(value)]] if isinstance(value, Tensor) else value

        return [swap(value) for value in args], {name: swap(value) for name, value in kwargs.items()}

    outputs = _PlainGradient.apply(entry, rebuilt, *tensors)  # type: ignore[no-untyped-call]
    return outputs[0] if len(outputs) == 1 else outputs


class _PlainGradient(torch.autograd.Function):
    """Forward by the operator, backward by differentiating its plain formula at the same inputs."""

    @staticmethod
    def forward(ctx: Any, entry: Kernel, rebuilt: Function, *inputs: Tensor) -> tuple[Any, ...]:
        ctx.entry, ctx.rebuilt = entry, rebuilt
        ctx.save_for_backward(*inputs)
        args, kwargs = rebuilt(inputs)
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _operator(entry.name)(*args, **kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # torch_npu's formulas take the gradient of the first output alone (statistics and the like have none).
        ctx.mark_non_differentiable(*tensors_in(outputs[1:]))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        calls[f"{ctx.entry.name}_backward"] += 1
        inputs = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in ctx.saved_tensors]
        args, kwargs = ctx.rebuilt(tuple(inputs))
        with torch.enable_grad():
            output = ctx.entry.formula(*args, **kwargs)
        differentiable = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(output, differentiable, gradients[0], allow_unused=True))
        return None, None, *(next(found) if tensor.requires_grad else None for tensor in inputs)
