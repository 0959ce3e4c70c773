"""What all layouts with one tensor for many experts share: splitting stacks into the factors of single experts.

E experts, R rank of the stack, H hidden, I intermediate, i in, o out.
"""

from torch import Tensor

from loaders.adapter_explain import explain_hidden, no_experts
from loaders.adapter_formats.base import AdapterBuilder, FormatContext, Projection
from loaders.adapter_keys import FactorPair
from loaders.adapter_types import ExpertShape, LoraPair
from loaders.zeros import is_zero, which_are_zero


def add_stack(
    builder: AdapterBuilder, layer: int, projection: Projection, factors: tuple[Tensor, Tensor], scale: float, num: int
) -> int:
    """Add A [num or 1, R, in] and B [num or 1, out, R] as factors of `num` experts; returns how many have no effect.

    A leading 1 means one factor for all of them: each expert gets the same tensor object, marked as shared.
    """
    sides = [_per_expert(factor, num) for factor in factors]
    is_shared = [num > 1 and factor.shape[0] == 1 for factor in factors]
    zeros = [which_are_zero(factor) * (num if factor.shape[0] == 1 else 1) for factor in factors]
    is_idle = [a or b for a, b in zip(*zeros, strict=True)]
    for expert, (a, b, idle) in enumerate(zip(*sides, is_idle, strict=True)):
        if not idle:
            builder.add_expert(layer, expert, projection, LoraPair(a, b, scale, *is_shared))
    return sum(is_idle)


def _per_expert(factor: Tensor, num: int) -> list[Tensor]:
    return [factor[0]] * num if factor.shape[0] == 1 else list(factor.unbind())


def add_gate_up(
    builder: AdapterBuilder, layer: int, factors: tuple[Tensor, Tensor], scale: float, num: int
) -> tuple[int, int]:
    """Add A [num, R, H] and B [num, 2I, R]; returns the rank of each half and how many experts have no effect."""
    gate, up = split_gate_up(*factors)
    num_idle = [add_stack(builder, layer, "gate", gate, scale, num), add_stack(builder, layer, "up", up, scale, num)]
    return gate[0].shape[1], min(num_idle)


def split_gate_up(a_ERH: Tensor, b_EoR: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(A, B) of gate and of up from A [E, R, H] and B [E, 2I, R].

    Gate and up share A, unless every off-diagonal block of B is exactly zero: then each gets its own half of the rank.
    """
    half_out, half_rank = b_EoR.shape[1] // 2, b_EoR.shape[2] // 2
    gate_EIR, up_EIR = b_EoR[:, :half_out], b_EoR[:, half_out:]
    if b_EoR.shape[2] % 2 == 0 and is_zero(gate_EIR[:, :, half_rank:]) and is_zero(up_EIR[:, :, :half_rank]):
        gate = (a_ERH[:, :half_rank], gate_EIR[:, :, :half_rank])
        return gate, (a_ERH[:, half_rank:], up_EIR[:, :, half_rank:])
    return (a_ERH, gate_EIR), (a_ERH, up_EIR)


def report_idle(builder: AdapterBuilder, name: str, num_idle: int, num: int) -> None:
    """Say of how many experts of a stack the factors are left out."""
    if num_idle:
        builder.skipped.append((name, f"lora_A or lora_B of {num_idle} of {num} experts is all zero, no effect"))


def expert_shape(pair: FactorPair, layer: int, context: FormatContext) -> ExpertShape | None:
    """The experts of the pair's layer; None with a problem where the base has none there."""
    shape = context.targets.experts.get(layer)
    if shape is None:
        context.problems.append(no_experts(pair.module, layer))
    return shape


def mismatch(pair: FactorPair, expected: str, hidden: tuple[int, int] | None = None) -> str:
    """A problem of shapes; `hidden` is (found, wanted) of the axis that tells the base."""
    cause = explain_hidden(*hidden) if hidden else ""
    return f"{pair.module}: lora_A {list(pair.a_shape)}, lora_B {list(pair.b_shape)}, expected {expected}{cause}"
