"""PEFT's ParamWrapper on stacked experts (`target_parameters`), and what other writers put under the same keys.

Keys: `...mlp.experts.lora_A.weight` and, when both stacks are adapted, `...mlp.experts.base_layer.lora_A.weight` for
the inner wrapper. A is expert-major in rows; PEFT's B is rank-major in columns (peft.tuners.lora.layer.ParamWrapper),
Unsloth's and Megatron-Bridge's are expert-major:

    A.reshape(E, R, in)   B.reshape(out, R, E).permute(2, 0, 1)   or B.reshape(out, E, R).permute(1, 0, 2)

E experts, R rank of the stack, H hidden, I intermediate. gate_up: in H, out 2I (gate rows, then up rows); down: in I,
out H. PEFT 0.18 and Megatron-Bridge swap in and out: delta W = (B A)^T. PEFT's conversion of old files joins gate and
up at rank 2r with a block-diagonal B; that is split again.
"""

import re
from collections import defaultdict
from collections.abc import MutableMapping
from typing import Literal

from torch import Tensor

from loaders.adapter_explain import explain_hidden
from loaders.adapter_formats.base import AdapterBuilder, FormatContext, StackOrder, take
from loaders.adapter_formats.stack_order import decide_order
from loaders.adapter_formats.stacks import add_gate_up, add_stack, expert_shape, report_idle
from loaders.adapter_keys import FactorPair
from loaders.adapter_types import ExpertShape

Stack = Literal["gate_up_proj", "down_proj"]
_MODULE = re.compile(r"^model\.layers\.(0|[1-9][0-9]*)\.mlp\.experts(?:\.base_layer)*$")


class ParamWrapperFormat:
    """Flat stacks of experts without a projection's name."""

    layout = "PEFT ParamWrapper stacks (target_parameters)"

    def recognises(self, pair: FactorPair) -> bool:
        """`...mlp.experts` and `...mlp.experts.base_layer`."""
        return _MODULE.match(pair.module) is not None

    def check(self, pairs: list[FactorPair], context: FormatContext) -> None:
        """Each stack must fit gate_up or down of its layer, each of these may occur once, and one order fits all."""
        known: list[tuple[FactorPair, ExpertShape]] = []
        for pair in pairs:
            shape = expert_shape(pair, _layer(pair), context)
            if shape is None:
                continue
            if _fits(pair, shape):
                known.append((pair, shape))
            else:
                context.problems.append(_mismatch(pair, shape))
        context.evidence.append(f"keys mlp.experts.lora_{{A,B}}: {len(pairs)} flat stacks")
        if not known:
            return
        is_order_free = all(shape.num_experts == 1 or pair.a_shape[0] == shape.num_experts for pair, shape in known)
        order = decide_order([_fits(pair, shape) for pair, shape in known], is_order_free, context)
        if order is not None:
            context.stack_order = order
            self._check_stacks(known, order, context)

    @staticmethod
    def _check_stacks(known: list[tuple[FactorPair, ExpertShape]], order: StackOrder, context: FormatContext) -> None:
        seen: dict[tuple[int, Stack], list[str]] = defaultdict(list)
        for pair, shape in known:
            layer, stack = _layer(pair), _stack(pair, shape, order)
            seen[layer, stack].append(pair.module)
            # A block-diagonal gate_up is two adapters of half the rank; `build` checks again once it can see B.
            limit = context.max_lora_rank * (2 if stack == "gate_up_proj" else 1)
            context.check_rank(pair.module, _name(layer, stack), pair.a_shape[0] // shape.num_experts, limit)
        for (layer, stack), modules in seen.items():
            if len(modules) > 1:
                context.problems.append(f"{' and '.join(modules)}: both are {stack} of layer {layer}")

    def build(
        self, pair: FactorPair, tensors: MutableMapping[str, Tensor], context: FormatContext, builder: AdapterBuilder
    ) -> None:
        """Split the stack into experts; those whose factors have no effect are left out."""
        layer, order = _layer(pair), context.stack_order
        if order is None:
            raise ValueError(f"{pair.module} was not checked")
        shape = context.targets.experts[layer]
        stack, num = _stack(pair, shape, order), shape.num_experts
        factors = _plain(*take(pair, tensors), order, num)
        name = _name(layer, stack)
        scale = context.rules.scale(name, factors[0].shape[1])
        if stack == "down_proj":
            num_idle = add_stack(builder, layer, "down", factors, scale, num)
        else:
            lora_rank, num_idle = add_gate_up(builder, layer, factors, scale, num)
            context.check_split(name, lora_rank)
        report_idle(builder, name, num_idle, num)


def _plain(a_stored: Tensor, b_stored: Tensor, order: StackOrder, num_experts: int) -> tuple[Tensor, Tensor]:
    """A [E, R, in] and B [E, out, R] from the factors as stored."""
    first = a_stored.view(num_experts, -1, a_stored.shape[1])
    if order.is_expert_major:
        second = b_stored.view(b_stored.shape[0], num_experts, -1).permute(1, 0, 2)
    else:
        second = b_stored.view(b_stored.shape[0], -1, num_experts).permute(2, 0, 1)
    if order.is_swapped:
        first, second = second.transpose(1, 2), first.transpose(1, 2)
    return first.contiguous(), second.contiguous()


def _layer(pair: FactorPair) -> int:
    match = _MODULE.match(pair.module)
    if match is None:
        raise ValueError(f"{pair.module} is not a stack of experts")
    return int(match[1])


def _name(layer: int, stack: Stack) -> str:
    """PEFT matches rank_pattern and alpha_pattern against the parameter's own name."""
    return f"model.layers.{layer}.mlp.experts.{stack}"


def _stack_dims(shape: ExpertShape) -> dict[tuple[int, int], Stack]:
    """(in, out) -> stack; the two differ for any sizes above zero."""
    return {
        (shape.hidden, 2 * shape.intermediate): "gate_up_proj",
        (shape.intermediate, shape.hidden): "down_proj",
    }


def _fits(pair: FactorPair, shape: ExpertShape) -> frozenset[bool]:
    """False if the shapes fit a stack of this layer as the base has it, True if they do with in and out swapped."""
    if len(pair.a_shape) != 2 or len(pair.b_shape) != 2:
        return frozenset()
    rows, a_width = pair.a_shape
    if rows == 0 or rows % shape.num_experts or pair.b_shape[1] != rows:
        return frozenset()
    dims = _stack_dims(shape)
    found = {False: (a_width, pair.b_shape[0]), True: (pair.b_shape[0], a_width)}
    return frozenset(is_swapped for is_swapped, sizes in found.items() if sizes in dims)


def _stack(pair: FactorPair, shape: ExpertShape, order: StackOrder) -> Stack:
    sizes = (pair.a_shape[1], pair.b_shape[0])
    return _stack_dims(shape)[sizes[::-1] if order.is_swapped else sizes]


def _mismatch(pair: FactorPair, shape: ExpertShape) -> str:
    found = f"{pair.module}: lora_A {list(pair.a_shape)}, lora_B {list(pair.b_shape)}"
    if len(pair.a_shape) != 2 or len(pair.b_shape) != 2:
        return f"{found}: stacked factors must be 2-D"
    if pair.a_shape[0] != pair.b_shape[1]:
        return f"{found}: rows of lora_A and columns of lora_B must be equal (rank x experts)"
    if pair.a_shape[0] == 0 or pair.a_shape[0] % shape.num_experts:
        return f"{found}: {pair.a_shape[0]} is not a multiple of the base's {shape.num_experts} experts"
    cause = explain_hidden(pair.a_shape[1], shape.hidden) or explain_hidden(pair.b_shape[0], shape.hidden)
    return (
        f"{found}: expected in/out {shape.hidden}/{2 * shape.intermediate} (gate_up_proj) or "
        f"{shape.intermediate}/{shape.hidden} (down_proj), or these swapped{cause}"
    )
