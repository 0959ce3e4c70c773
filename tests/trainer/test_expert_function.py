"""The routed experts' hand-written forward and backward against autograd through their plain form, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from runtime.ops import cpu_threads
from runtime.ops.base import Ops
from runtime.ops.cpu import CpuOps
from runtime.ops.cpu_packed_groups import PackedGroups
from runtime.ops.frozen_groups import PlainGroups
from runtime.trainer.dropout import Dropout
from runtime.trainer.expert_function import BaseExperts, ExpertFactors, routed_experts
from runtime.trainer.expert_rows import ExpertRows
from runtime.trainer.reference_experts import reference_experts

HIDDEN, WIDTH, RANK = 24, 20, 3
ALL = range(6)
OPS = CpuOps()


class InShares(CpuOps):
    """Every grouped computation in three shares, each in a thread of its own."""

    def shares(self, counts_G: Tensor) -> list[tuple[slice, slice]]:
        return cpu_threads.equal_shares(counts_G.tolist(), 3)

    def side_by_side(self, tasks: Sequence[Callable[[], cpu_threads.T]]) -> list[cpu_threads.T]:
        with ThreadPoolExecutor(3) as pool:
            return [done.result() for done in [pool.submit(torch.no_grad()(task)) for task in tasks]]


@dataclass(frozen=True)
class Case:
    """`counts`: routed rows of each expert. `num_dropped`: choices of the tokens that are computed nowhere."""

    counts: tuple[int, ...]
    num_tokens: int
    adapted: Sequence[int] | None = ALL
    num_dropped: int = 0


CASES = {
    "all adapted, one expert idle": Case((5, 0, 3, 1, 9, 2), 10),
    "few rows for each expert": Case((1, 0, 1, 0, 1, 1), 2),
    "many rows": Case((90, 0, 33, 17, 60, 120), 160),
    "some adapted": Case((5, 4, 3, 0, 9, 3), 12, adapted=(1, 3, 4)),
    "many rows, one adapted": Case((90, 20, 33, 17, 60, 100), 160, adapted=(2,)),
    "adapted ones are all idle": Case((5, 0, 3, 0, 10, 2), 10, adapted=(1, 3)),
    "none adapted": Case((5, 0, 3, 1, 9, 2), 10, adapted=None),
    "choices dropped": Case((5, 0, 3, 1, 9, 2), 13, num_dropped=6),
    "one expert for all": Case((0, 0, 0, 40, 0, 0), 20),
    "no rows": Case((0,) * 6, 4, num_dropped=8),
    "no tokens": Case((0,) * 6, 0),
    "no tokens, some adapted": Case((0,) * 6, 0, adapted=(1, 3)),
}


@dataclass(frozen=True)
class Inputs:
    """Leaves that want gradients, and all that goes with them."""

    x: Tensor
    gates: Tensor
    w13: Tensor
    w2: Tensor
    factors: tuple[Tensor, ...]
    rows: ExpertRows
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """Fresh leaves of a dtype, except factors and gates, which are float32 or better."""
        wide = torch.promote_types(dtype, torch.float32)

        def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
            return x.detach().to(dtype).requires_grad_()

        frozen = (self.w13.to(dtype), self.w2.to(dtype))
        factors = tuple(leaf(factor, wide) for factor in self.factors)
        return Inputs(
            leaf(self.x, dtype), leaf(self.gates, wide), *frozen, factors, self.rows, self.grad.to(dtype)
        )


def make_inputs(case: Case) -> Inputs:
    """Two choices of each token, spread at random over the routed rows; rows are sorted by expert."""
    generator = torch.Generator().manual_seed(7)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    num_rows = sum(case.counts)
    assert num_rows + case.num_dropped == 2 * case.num_tokens
    choices = torch.randperm(2 * case.num_tokens, generator=generator)[:num_rows]
    places = torch.full((2 * case.num_tokens,), num_rows)
    places[choices] = torch.arange(num_rows)
    adapted = () if case.adapted is None else tuple(case.adapted)
    counts_E = torch.tensor(case.counts)
    is_adapted_M = torch.isin(torch.repeat_interleave(counts_E), torch.tensor(adapted, dtype=torch.int64))
    all_or_none = len(adapted) in (0, len(case.counts))
    rows = ExpertRows(
        choices // 2,
        places.view(-1, 2),
        case.num_dropped > 0,
        counts_E,
        None if all_or_none else is_adapted_M.nonzero().squeeze(1),
        counts_E if all_or_none else counts_E[torch.tensor(adapted)],
        torch.randint(0, 10**9, (num_rows,), generator=generator),
        None if all_or_none else torch.tensor(adapted),
    )
    count = len(adapted)
    shapes = ((count, RANK, HIDDEN), (count, 2 * WIDTH, RANK), (count, RANK, WIDTH), (count, HIDDEN, RANK))
    return Inputs(
        randn(case.num_tokens, HIDDEN),
        torch.rand(num_rows, generator=generator),
        randn(len(case.counts), 2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5),
        randn(len(case.counts), HIDDEN, WIDTH, scale=WIDTH**-0.5),
        tuple(randn(*shape, scale=0.4) for shape in shapes) if count else (),
        rows,
        randn(case.num_tokens, HIDDEN),
    )


def run(
    inputs: Inputs,
    dtype: torch.dtype,
    *,
    by_hand: bool,
    dropout: Dropout | None = None,
    ops: Ops = OPS,
    pack: bool = False,
) -> tuple[Tensor, ...]:
    """The value and the gradients of x, gates and factors."""
    leaves = inputs.to(dtype)
    second = None if dropout is None else Dropout(dropout.p, ~dropout.key)
    factors = ExpertFactors(*leaves.factors, 1.7, 0.6, dropout, second) if leaves.factors else None
    if by_hand:
        out = routed_experts(leaves.x, leaves.gates, frozen(leaves, ops, pack=pack), factors, leaves.rows)
    else:
        plain = reference_experts if dropout is None else dropping_reference
        out = plain(leaves.x, leaves.gates, leaves.w13, leaves.w2, factors, leaves.rows)
    wanted = (leaves.x, leaves.gates, *leaves.factors)
    if not out.requires_grad:  # the reference, where no row depends on anything
        return out, *(torch.zeros_like(leaf) for leaf in wanted)
    found = torch.autograd.grad(out, wanted, leaves.grad, allow_unused=True)
    return out, *(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, wanted, strict=True))


def frozen(inputs: Inputs, ops: Ops, *, pack: bool = False) -> BaseExperts:
    """The base's weights as the back-end holds them."""
    if pack:
        return BaseExperts(ops.pack_groups(inputs.w13), ops.pack_groups(inputs.w2), ops)
    return BaseExperts(PlainGroups(inputs.w13, ops), PlainGroups(inputs.w2, ops), ops)


def dropping_reference(
    x: Tensor, gates: Tensor, w13: Tensor, w2: Tensor, factors: ExpertFactors | None, rows: ExpertRows
) -> Tensor:
    """`reference_experts` in matrices for all experts adapted, with the masks of dropout written out."""
    assert factors is not None and factors.dropout13 is not None and factors.dropout2 is not None
    assert rows.rows_L is None and rows.ids_M is not None
    mask13 = factors.dropout13.scaled_mask(rows.ids_M, HIDDEN, 0, x.dtype)
    mask2 = factors.dropout2.scaled_mask(rows.ids_M, WIDTH, 0, x.dtype)
    out, start = torch.zeros_like(x), 0
    for expert, count in enumerate(rows.counts_E.tolist()):
        places = slice(start, start + count)
        tokens = rows.token_of_M[places]
        x_NH = x[tokens]
        change = factors.scale13 * (x_NH * mask13[places]) @ factors.a13[expert].T @ factors.b13[expert].T
        gate, up = (x_NH @ w13[expert].T + change).chunk(2, -1)
        # The gate is part of what the second projection sees; being one number a row, it commutes with everything.
        inner = torch.nn.functional.silu(gate) * up * gates[places, None]
        change = factors.scale2 * (inner * mask2[places]) @ factors.a2[expert].T @ factors.b2[expert].T
        out = out.index_add(0, tokens, inner @ w2[expert].T + change)
        start += count
    return out


def assert_near(seen: Tensor, truth: Tensor) -> None:
    """Within float32's rounding of the largest number."""
    assert seen.shape == truth.shape
    if truth.numel():
        assert (seen.double() - truth).abs().max() <= 2e-6 * truth.abs().max()


@pytest.mark.parametrize("ops", [OPS, InShares()], ids=["whole", "in shares"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_all_gradients_equal_the_plain_form(name: str, ops: Ops) -> None:
    inputs = make_inputs(CASES[name])
    seen = run(inputs, torch.float32, by_hand=True, ops=ops)
    expected = run(inputs, torch.float64, by_hand=False)
    assert len(seen) == len(expected) == 3 + len(inputs.factors)
    for ours, truth in zip(seen, expected, strict=True):
        assert ours.dtype is torch.float32
        assert_near(ours, truth)


def test_plain_form_has_the_gradients_of_finite_differences() -> None:
    """So that the truth of the tests above is one."""
    inputs = make_inputs(CASES["few rows for each expert"]).to(torch.float64)

    def function(x: Tensor, gates: Tensor, *factors: Tensor) -> Tensor:
        return reference_experts(x, gates, inputs.w13, inputs.w2, ExpertFactors(*factors, 1.7, 0.6), inputs.rows)

    assert torch.autograd.gradcheck(function, (inputs.x, inputs.gates, *inputs.factors), fast_mode=True)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.adapted is ALL])
def test_dropout_masks_the_inputs_of_both_projections_on_the_way_back_too(name: str) -> None:
    inputs = make_inputs(CASES[name])
    dropout = Dropout(0.5, 1234567890123)
    seen = run(inputs, torch.float32, by_hand=True, dropout=dropout)
    expected = run(inputs, torch.float64, by_hand=False, dropout=dropout)
    for ours, truth in zip(seen, expected, strict=True):
        assert_near(ours, truth)


def test_dropout_of_some_adapted_experts_is_that_of_all_with_zero_factors_elsewhere() -> None:
    inputs = make_inputs(CASES["some adapted"])
    dropout, adapted = Dropout(0.5, -99), torch.tensor([1, 3, 4])
    padded = tuple(torch.zeros(6, *f.shape[1:]).index_copy(0, adapted, f) for f in inputs.factors)
    rows = replace(inputs.rows, rows_L=None, counts_G=inputs.rows.counts_E)
    some = run(inputs, torch.float32, by_hand=True, dropout=dropout)
    every = run(replace(inputs, factors=padded, rows=rows), torch.float64, by_hand=False, dropout=dropout)
    for ours, truth in zip(some, every, strict=True):
        chosen = truth[adapted] if truth.ndim == 3 else truth
        assert_near(ours, chosen)


@pytest.mark.parametrize("ops", [OPS, InShares()], ids=["whole", "in shares"])
@pytest.mark.parametrize("pack", [False, True], ids=["plain weights", "packed weights"])
@pytest.mark.parametrize("name", ["many rows", "some adapted", "choices dropped", "no rows"])
def test_bfloat16_computes_the_same_up_to_its_rounding(name: str, pack: bool, ops: Ops) -> None:
    inputs = make_inputs(CASES[name])
    if pack and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert isinstance(frozen(inputs.to(torch.bfloat16), ops, pack=True).w13, PackedGroups)
    seen = run(inputs, torch.bfloat16, by_hand=True, pack=pack, ops=ops)
    assert seen[0].dtype is seen[1].dtype is torch.bfloat16
    assert all(gradient.dtype is torch.float32 for gradient in seen[2:])
    for ours, truth in zip(seen, run(inputs, torch.float64, by_hand=False), strict=True):
        assert (ours.double() - truth).norm() <= 0.02 * truth.norm()


def test_an_expert_without_rows_gets_gradients_of_zero() -> None:
    inputs = make_inputs(CASES["all adapted, one expert idle"])
    for gradient in run(inputs, torch.float32, by_hand=True)[3:]:
        assert gradient[1].count_nonzero() == 0
        assert all(gradient[expert].count_nonzero() for expert in (0, 2, 3, 4, 5))


def test_gates_and_frozen_inputs_may_go_without_gradients() -> None:
    """The first layer's input, or a router in evaluation, wants none."""
    inputs = make_inputs(CASES["some adapted"])
    leaves = inputs.to(torch.float32)
    factors = ExpertFactors(*leaves.factors, 1.7, 0.6)
    out = routed_experts(leaves.x.detach(), leaves.gates.detach(), frozen(leaves, OPS), factors, leaves.rows)
    found = torch.autograd.grad(out, leaves.factors, leaves.grad)
    for ours, truth in zip(found, run(inputs, torch.float64, by_hand=False)[3:], strict=True):
        assert_near(ours, truth)
