"""The tensors of an adapter file under PEFT's keys, in either layout, made one at a time while the file is written.

E experts, R rank of a stack, r rank of the file, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from loaders.adapter_types import AdapterTargets, ExpertLora, ExpertShape, LoraPair
from runtime.trainer.export.safetensors_writer import TensorHeader
from runtime.trainer.export.uniform import Uniform, a_of, b_of

Linears: TypeAlias = Mapping[str, LoraPair]
Experts: TypeAlias = Mapping[int, Mapping[int, ExpertLora]]
Stack: TypeAlias = Literal["gate_up_proj", "down_proj"]

PREFIX = "base_model.model."
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class FileTensor:
    """A tensor to be written: what the header says, and how to make it."""

    header: TensorHeader
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Layout:
    """What all tensors of one file have in common."""

    targets: AdapterTargets
    uniform: Uniform
    dtype: torch.dtype

    def file_tensor(self, key: str, shape: tuple[int, int], make: Callable[[], Tensor]) -> FileTensor:
        """The tensor of `key` without PEFT's prefix and suffix, e.g. `lm_head.lora_A`."""
        return FileTensor(TensorHeader(f"{PREFIX}{key}.weight", self.dtype, shape), make)

    def pair(self, module: str, pair: LoraPair) -> Iterator[FileTensor]:
        """lora_A [r, in] and lora_B [out, r] of one module."""
        lora_rank, num_in, num_out = self.uniform.lora_rank, pair.a.shape[1], pair.b.shape[0]
        make_a = partial(a_of, pair, self.uniform, self.dtype)
        make_b = partial(b_of, pair, self.uniform, self.dtype)
        yield self.file_tensor(f"{module}.lora_A", (lora_rank, num_in), make_a)
        yield self.file_tensor(f"{module}.lora_B", (num_out, lora_rank), make_b)


def named_pairs(linears: Linears, experts: Experts) -> Iterator[tuple[str, LoraPair]]:
    """(module name on disk, factors) of everything that is adapted."""
    yield from linears.items()
    for layer, adapted in sorted(experts.items()):
        for expert, lora in sorted(adapted.items()):
            for projection in PROJECTIONS:
                pair = projection_of(lora, projection)
                if pair is not None:
                    yield f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj", pair


def projection_of(lora: ExpertLora, projection: str) -> LoraPair | None:
    """The factors of `gate`, `up` or `down`."""
    return {"gate": lora.gate, "up": lora.up, "down": lora.down}[projection]


def adapted_stacks(experts: Experts) -> tuple[Stack, ...]:
    """Which stacks of experts the adapter changes anywhere; gate and up are one stack."""
    adapted = [lora for layer in experts.values() for lora in layer.values()]
    stacks: list[Stack] = []
    if any(lora.gate or lora.up for lora in adapted):
        stacks.append("gate_up_proj")
    if any(lora.down for lora in adapted):
        stacks.append("down_proj")
    return tuple(stacks)


def per_expert_tensors(linears: Linears, experts: Experts, layout: Layout) -> Iterator[FileTensor]:
    """One pair per module and per projection of each adapted expert.

    An adapted expert has all projections that any expert has (zeros where it has none): PEFT joins gate and up.
    """
    for module, pair in linears.items():
        yield from layout.pair(module, pair)
    stacks = adapted_stacks(experts)
    projections = [name for name in PROJECTIONS if ("down_proj" if name == "down" else "gate_up_proj") in stacks]
    for layer, adapted in sorted(experts.items()):
        for expert, lora in sorted(adapted.items()):
            for projection in projections:
                pair = projection_of(lora, projection) or _no_change(layout.targets.experts[layer], projection)
                yield from layout.pair(f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj", pair)


def stacked_tensors(linears: Linears, experts: Experts, layout: Layout) -> Iterator[FileTensor]:
    """PEFT's ParamWrapper stacks: A [E*R, in], experts outermost; B [out, R*E], experts innermost.

    PEFT wraps the stacks of every layer, so all layers with routed experts are written, with zeros where nothing
    changes. R is r, or 2r for gate_up where gate and up do not share A.
    """
    for module, pair in linears.items():
        yield from layout.pair(module, pair)
    stacks = adapted_stacks(experts)
    gate_up_rank = layout.uniform.lora_rank * (1 if gate_and_up_share_a(experts) else 2)
    for layer, shape in sorted(layout.targets.experts.items()) if stacks else ():
        adapted, name = experts.get(layer, {}), f"model.layers.{layer}.mlp.experts"
        if "gate_up_proj" in stacks:
            # Of two adapted parameters of one module, PEFT wraps the second one around the first.
            inner = f"{name}.base_layer" if len(stacks) == 2 else name
            make = partial(_gate_up, adapted, shape, layout, gate_up_rank)
            rows = shape.num_experts * gate_up_rank
            yield from _stack(layout, inner, rows, shape.hidden, 2 * shape.intermediate, make)
        if "down_proj" in stacks:
            make = partial(_down, adapted, shape, layout)
            rows = shape.num_experts * layout.uniform.lora_rank
            yield from _stack(layout, name, rows, shape.intermediate, shape.hidden, make)


def gate_and_up_share_a(experts: Experts) -> bool:
    """Whether gate and up have equal A in every expert, so that one stack of rank r holds both."""
    return all(
        lora.gate is None or lora.up is None or lora.gate.a is lora.up.a or torch.equal(lora.gate.a, lora.up.a)
        for adapted in experts.values()
        for lora in adapted.values()
    )


def _stack(
    layout: Layout, name: str, rows: int, num_in: int, num_out: int, make: Callable[[bool], Tensor]
) -> Iterator[FileTensor]:
    yield layout.file_tensor(f"{name}.lora_A", (rows, num_in), partial(make, True))
    yield layout.file_tensor(f"{name}.lora_B", (num_out, rows), partial(make, False))


def _down(adapted: Mapping[int, ExpertLora], shape: ExpertShape, layout: Layout, is_a: bool) -> Tensor:
    """A [E*r, I] or B [H, r*E]."""
    size = (layout.uniform.lora_rank, shape.intermediate) if is_a else (shape.hidden, layout.uniform.lora_rank)
    stack = torch.zeros(shape.num_experts, *size, dtype=layout.dtype)
    factor = a_of if is_a else b_of
    for expert, lora in adapted.items():
        if lora.down is not None:
            stack[expert] = factor(lora.down, layout.uniform, layout.dtype)
    return _flat(stack, is_a)


def _gate_up(
    adapted: Mapping[int, ExpertLora], shape: ExpertShape, layout: Layout, stack_rank: int, is_a: bool
) -> Tensor:
    """A [E*R, H] or B [2I, R*E]: gate rows, then up rows; block-diagonal where R is 2r."""
    size = (stack_rank, shape.hidden) if is_a else (2 * shape.intermediate, stack_rank)
    stack = torch.zeros(shape.num_experts, *size, dtype=layout.dtype)
    lora_rank = layout.uniform.lora_rank
    for expert, lora in adapted.items():
        for half, pair in enumerate((lora.gate, lora.up)):
            first_column = half * (stack_rank - lora_rank)  # 0 for both where they share A
            columns = slice(first_column, first_column + lora_rank)
            rows = slice(half * shape.intermediate, (half + 1) * shape.intermediate)
            if pair is not None and is_a:
                stack[expert, columns] = a_of(pair, layout.uniform, layout.dtype)
            elif pair is not None:
                stack[expert, rows, columns] = b_of(pair, layout.uniform, layout.dtype)
    return _flat(stack, is_a)


def _flat(stack: Tensor, is_a: bool) -> Tensor:
    """[E, R, in] -> [E*R, in], or [E, out, R] -> [out, R*E]."""
    return stack.flatten(0, 1) if is_a else stack.permute(1, 2, 0).flatten(1)


def _no_change(shape: ExpertShape, projection: str) -> LoraPair:
    sizes = (shape.hidden, shape.intermediate)
    num_in, num_out = sizes if projection != "down" else sizes[::-1]
    return LoraPair(torch.zeros(1, num_in), torch.zeros(num_out, 1), 1.0)
