"""Random histories of adapters that come and go piece by piece, against a plain model and against fresh pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.adapters.device_pages import DevicePages
from runtime.adapters.host_adapter import HostAdapter, SharedOuterPages
from runtime.adapters.lora_plan import BASE_SLOT, LoraPlan
from runtime.adapters.page_pool import HostPages, PagePool
from runtime.ops.base import Ops
from runtime.ops.cpu import CpuOps
from runtime.ops.cuda.ops import CudaOps

CPU = torch.device("cpu")
NUM_EXPERTS, NUM_SLOTS, HIDDEN, WIDTH = 4, 3, 16, 8

SLOTS = st.integers(0, NUM_SLOTS - 1)


def _marked(regions: list[int], mark: float) -> HostPages:
    """Pages whose every number tells the adapter and the region."""
    values = torch.tensor([mark + region for region in regions])[:, None, None]
    return HostPages(2, regions, {"a": values.expand(-1, 4, 2).clone(), "b": -values.expand(-1, 2, 4).clone()})


NUM_PIECES = st.sampled_from((1, 2, 20))
POOL_ACTIONS = st.one_of(
    st.tuples(st.just("replace"), SLOTS, st.sampled_from(([0, 1, 2, 3], [0, 1], [1], [2]))),
    st.tuples(st.just("go on"), SLOTS, NUM_PIECES),
    st.tuples(st.just("go on"), SLOTS, NUM_PIECES),
    st.tuples(st.just("remove"), SLOTS, st.none()),
    st.tuples(st.just("compact"), st.just(NUM_SLOTS), st.none()),
    st.tuples(st.just("go on"), st.just(NUM_SLOTS), NUM_PIECES),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(POOL_ACTIONS, max_size=25))
def test_a_pool_holds_what_was_put_there_however_pieces_interleave(actions: list[tuple[str, int, Any]]) -> None:
    pool = PagePool(_marked([0], 0.0), NUM_EXPERTS, NUM_SLOTS, CPU)
    model: dict[int, tuple[list[int], float]] = {}
    under_way: dict[int, tuple[Iterator[int], list[int], float]] = {}

    def go_on(slot: int, num_pieces: int) -> None:
        for _ in range(num_pieces):
            if slot in under_way and next(under_way[slot][0], None) is None:
                _, regions, mark = under_way.pop(slot)
                if slot < NUM_SLOTS:
                    model[slot] = regions, mark

    for number, (action, slot, what) in enumerate(actions, 1):
        if action == "go on":
            go_on(slot, what)
        elif action == "compact":
            under_way[slot] = pool.compacting(1), [], 0.0
        else:
            under_way.pop(slot, None)
            model.pop(slot, None)
            pool.remove(slot)
            if action == "replace":
                mark = 100.0 * number
                under_way[slot] = pool.inserting(slot, _marked(what, mark), 1), what, mark
                go_on(slot, 1)
        _check(pool, model)
    for slot in list(under_way):
        while slot in under_way:
            go_on(slot, 1)
    for _ in pool.compacting(1):
        pass
    _check(pool, model)
    assert pool.num_pages == sum(len(regions) for regions, _ in model.values())


def _check(pool: PagePool, model: dict[int, tuple[list[int], float]]) -> None:
    assert pool.slots == set(model)
    assert pool.whole_slots == {slot for slot, (regions, _) in model.items() if len(regions) == NUM_EXPERTS}
    held = 0
    for slot in range(-1, NUM_SLOTS):
        regions, mark = model.get(slot, ([], 0.0))
        row = pool.table[slot + 1].tolist()
        assert [region for region, page in enumerate(row) if page >= 0] == regions
        for region in regions:
            assert pool.page(slot, region) == row[region]
            assert bool((pool.factor("a")[row[region]] == mark + region).all())
            assert bool((pool.factor("b")[row[region]] == -mark - region).all())
        held += len(regions)
    assert all(bool(tensor.isfinite().all()) for tensor in pool.factors.values())
    assert pool.num_bytes == held * pool.page_bytes
    assert pool.num_bytes + pool.vacant_bytes == sum(tensor.nbytes for tensor in pool.factors.values())
    following = list(zip(pool.next_regions_P.tolist(), pool.next_slots_P.tolist(), strict=True))
    assert following == [*pool.places.owners[1:], (NUM_EXPERTS, NUM_SLOTS)][: pool.num_pages]


def _adapter(seed: int, rank_of_experts: dict[int, int], rank_of_linear: int, *, integers: bool) -> HostAdapter:
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    def pages(rank: int, experts: list[int]) -> HostPages:
        n = len(experts)
        columns = {"b_gate": WIDTH, "b_up": WIDTH, "b2": HIDDEN}
        factors = {name: factor(n, rank, width) for name, width in columns.items()}
        a = {"a13": factor(n, HIDDEN, 2 * rank), "a2": factor(n, WIDTH, rank)}
        return HostPages(rank, experts, {**a, **factors})

    by_rank: dict[int, list[int]] = {}
    for expert, rank in sorted(rank_of_experts.items()):
        by_rank.setdefault(rank, []).append(expert)
    linears = {}
    if rank_of_linear:
        pair = {"a": factor(1, HIDDEN, rank_of_linear), "b": factor(1, rank_of_linear, HIDDEN)}
        linears["m"] = HostPages(rank_of_linear, [0], pair)
    layers = {layer: [pages(rank, experts) for rank, experts in by_rank.items()] for layer in (1, 2)}
    rank, experts = next(iter(by_rank.items()))
    factors = {name: tensor.round() for name, tensor in pages(rank, experts).factors.items()}
    outer = HostPages(rank, [0], {"a13": factors.pop("a13")[:1].clone(), "b2": factors.pop("b2")[:1].clone()})
    return HostAdapter(linears, layers, {3: SharedOuterPages(outer, HostPages(rank, experts, factors))})


RANKS = st.sampled_from((8, 16))
ADAPTERS = st.tuples(st.dictionaries(st.integers(0, NUM_EXPERTS - 1), RANKS, min_size=1), st.sampled_from((0, 8, 16)))
ACTIONS = st.one_of(
    st.tuples(st.just("install"), SLOTS, ADAPTERS),
    st.tuples(st.just("install"), SLOTS, ADAPTERS),
    st.tuples(st.just("remove"), SLOTS, st.none()),
    st.tuples(st.just("break off"), SLOTS, ADAPTERS),
    st.tuples(st.just("compact"), st.integers(1, 5), st.none()),
    st.tuples(st.just("merge"), st.integers(1, 5), st.none()),
)


@pytest.mark.parametrize("ops", [CpuOps(), CudaOps()], ids=["rows by page", "group lists"])
def test_after_any_history_mixed_batches_give_what_fresh_pages_give(ops: Ops) -> None:
    """Bit for bit. Numbers are whole where the heights of products may differ: in the second back-end, and in layer 3,
    whose outer factors are shared."""
    integers = isinstance(ops, CudaOps)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(ACTIONS, min_size=1, max_size=12), st.integers(0, 1000))
    def check(actions: list[tuple[str, int, Any]], seed: int) -> None:
        pages = DevicePages(NUM_EXPERTS, NUM_SLOTS, CPU, max_copy_bytes=1500)
        live: dict[int, HostAdapter] = {}
        for number, (action, slot, recipe) in enumerate(actions):
            if action in ("compact", "merge"):
                pieces = pages.compact() if action == "compact" else pages.merge()
                for _, _ in zip(range(slot), pieces, strict=False):
                    pass
                continue
            live.pop(slot, None)
            pages.remove(slot)
            if recipe is None:
                continue
            adapter = _adapter(number, *recipe, integers=integers)
            pieces = pages.install(slot, adapter)
            if action == "break off":
                next(pieces)
                pages.remove(slot)
            else:
                live[slot] = adapter
                for _ in pieces:
                    pass
        fresh = DevicePages(NUM_EXPERTS, NUM_SLOTS, CPU)
        for slot, adapter in live.items():
            for _ in fresh.install(slot, adapter):
                pass
        assert pages.num_bytes == fresh.num_bytes == sum(adapter.num_bytes for adapter in live.values())
        for got, wanted in zip(_outputs(pages, ops, live, seed), _outputs(fresh, ops, live, seed), strict=True):
            assert torch.equal(got, wanted)
        for _ in pages.compact():
            pass
        assert (pages.num_bytes, pages.vacant_bytes, pages.has_young) == (fresh.num_bytes, 0, False)
        for got, wanted in zip(_outputs(pages, ops, live, seed), _outputs(fresh, ops, live, seed), strict=True):
            assert torch.equal(got, wanted)

    check()


def _outputs(pages: DevicePages, ops: Ops, live: dict[int, HostAdapter], seed: int) -> list[Tensor]:
    """What a mixed batch of the base and all adapters gives, of linears and of experts."""
    generator = torch.Generator().manual_seed(seed)
    slots = [BASE_SLOT, *sorted(live)]
    counts = [int(torch.randint(1, 5, (), generator=generator)) for _ in slots]
    num_tokens = sum(counts)
    plan = LoraPlan(pages, ops, slots, counts, CPU)
    x = torch.randint(-3, 4, (num_tokens, HIDDEN), generator=generator).float()
    outputs = [torch.zeros(num_tokens, HIDDEN)]
    plan.add_linear_("m", outputs[0], x)
    some = torch.arange(0, num_tokens, 2)
    outputs.append(torch.zeros(len(some), HIDDEN))
    plan.add_linear_of_rows_("m", outputs[1], x[some], some)
    for sequence in range(len(slots)):
        outputs.append(torch.zeros(num_tokens, HIDDEN))
        plan.add_linear_of_sequence_("m", outputs[-1], x, sequence)
    runs = sorted(plan.factors_of_rows("m", list(range(num_tokens))), key=lambda run: run[0].start)
    outputs += [factor for _, a, b in runs for factor in (a, b)]
    for layer in (1, 2, 3):
        experts = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(2).indices
        keys, keys_of_expert = plan.route_keys(experts)
        rows = ops.sort_rows(x, keys, NUM_EXPERTS * keys_of_expert)
        deltas = plan.expert_deltas(layer, keys, rows, x)
        gate_up, down = torch.zeros(2 * num_tokens, 2 * WIDTH), torch.zeros(2 * num_tokens, HIDDEN)
        deltas.add_gate_up_(gate_up, rows.x_MH)
        deltas.add_down_(down, rows.x_MH[:, :WIDTH].contiguous())
        combined = torch.zeros(num_tokens, HIDDEN)
        deltas.add_combined_(combined, torch.full((num_tokens, 2), 0.5))
        outputs += [gate_up, down, combined]
    return outputs


def test_a_piece_of_an_install_or_a_compaction_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []
    copy, select = Tensor.index_copy_, torch.index_select

    def counted_copy(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
        pieces[-1] += source.nbytes if source.is_floating_point() else 0
        return copy(self, dim, index, source)

    def counted_select(*args: Any, out: Tensor) -> Tensor:
        pieces[-1] += out.nbytes
        return select(*args, out=out)

    monkeypatch.setattr(Tensor, "index_copy_", counted_copy)
    monkeypatch.setattr(torch, "index_select", counted_select)
    all_experts = dict.fromkeys(range(NUM_EXPERTS), 8)
    limit = 2000
    pages = DevicePages(NUM_EXPERTS, NUM_SLOTS, CPU, limit)

    def run(iterator: Iterator[None]) -> int:
        pieces[:] = [0]
        for _ in iterator:
            pieces.append(0)
        return sum(pieces)

    first, second = (_adapter(seed, all_experts, 8, integers=False) for seed in range(2))
    assert run(pages.install(0, first)) == first.num_bytes and max(pieces) <= limit and len(pieces) > 8
    run(pages.install(1, second))
    assert max(pieces) <= 2 * limit
    pages.remove(0)
    assert run(pages.install(0, second)) == second.num_bytes and max(pieces) <= limit
    pages.remove(1)
    assert run(pages.compact()) == second.num_bytes and max(pieces) <= limit


def test_vacant_pages_are_given_back_before_all_pages_would_take_more_than_they_may() -> None:
    few, others = {0: 8, 1: 8}, {2: 8, 3: 8}
    one, two = (_adapter(seed, few, 0, integers=False) for seed in range(2))
    newcomers = (_adapter(5, others, 0, integers=False), _adapter(6, {0: 16}, 0, integers=False))
    limit = two.num_bytes + max(newcomer.num_bytes for newcomer in newcomers)
    pages = DevicePages(NUM_EXPERTS, NUM_SLOTS, CPU, 1000)
    for slot, adapter in enumerate((one, two)):
        for _ in pages.install(slot, adapter, limit):
            pass
    pages.remove(0)
    for newcomer in newcomers:
        assert pages.num_bytes + pages.vacant_bytes + newcomer.num_bytes > limit
        slot = pages.best_slot([2, 0], newcomer)
        for _ in pages.install(slot, newcomer, limit):
            assert pages.num_bytes + pages.vacant_bytes <= limit
        assert pages.num_bytes + pages.vacant_bytes <= limit
        pages.remove(slot)


def test_a_newcomer_gets_the_slot_whose_vacant_pages_serve_it_best() -> None:
    few, all_experts = {0: 8, 2: 8}, dict.fromkeys(range(NUM_EXPERTS), 8)
    pages = DevicePages(NUM_EXPERTS, NUM_SLOTS, CPU)
    for slot, experts in enumerate((few, all_experts, {1: 16})):
        for _ in pages.install(slot, _adapter(slot, experts, 8, integers=False)):
            pass
    for slot in range(NUM_SLOTS):
        pages.remove(slot)
    assert pages.best_slot([0, 1, 2], _adapter(7, all_experts, 0, integers=False)) == 1
    assert pages.best_slot([0, 1, 2], _adapter(7, {1: 16}, 0, integers=False)) == 2
    assert pages.best_slot([2, 1, 0], _adapter(7, few, 0, integers=False)) == 0
    assert pages.best_slot([2, 1, 0], _adapter(7, {0: 8, 3: 16}, 0, integers=False)) == 0
    assert pages.best_slot([2, 1], _adapter(7, {0: 8, 3: 8}, 0, integers=False)) == 1
