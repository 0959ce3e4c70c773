"""Pages in the layout that a device asks for, and what each page knows of the next one."""

from __future__ import annotations

import pytest
import torch

from loaders.adapter import AdapterWeights, ExpertLora, LoraPair
from loaders.errors import AdapterError
from runtime.adapters.host_adapter import FactorLayout, _expert_pages, to_host_adapter
from runtime.adapters.page_pool import HostPages, PagePool

CPU = torch.device("cpu")


def _pages(regions: list[int]) -> HostPages:
    shape = (len(regions), 4, 2)
    return HostPages(2, regions, {"a": torch.randn(shape), "b": torch.randn(shape).transpose(1, 2).contiguous()})


def _insert(pool: PagePool, slot: int, pages: HostPages) -> None:
    """Add a slot's pages, all at once."""
    for _ in pool.inserting(slot, pages, pool.num_bytes + pages.num_bytes):
        pass


def test_pages_know_the_place_of_the_next_one() -> None:
    pool = PagePool(_pages([0]), num_regions=4, max_slots=2, device=CPU)
    _insert(pool, 1, _pages([1, 3]))
    _insert(pool, 0, _pages([1]))
    assert pool.table.tolist() == [[-1, -1, -1, -1], [-1, 0, -1, -1], [-1, 1, -1, 2]]
    assert (pool.next_regions_P.tolist(), pool.next_slots_P.tolist()) == ([1, 3, 4], [1, 1, 2])
    assert (pool.page(1, 3), pool.num_pages, pool.whole_slots) == (2, 3, frozenset())
    pool.remove(0)
    assert pool.table.tolist()[1] == [-1] * 4 and (pool.num_pages, pool.slots) == (3, {1})
    for _ in pool.compacting(1):
        pass
    assert (pool.next_regions_P.tolist(), pool.next_slots_P.tolist()) == ([3, 4], [1, 2])
    assert pool.table.tolist()[2] == [-1, 0, -1, 1]


def test_a_slot_is_written_into_its_own_vacant_pages_and_nothing_else_is_copied() -> None:
    pool = PagePool(_pages([0]), num_regions=4, max_slots=2, device=CPU)
    _insert(pool, 0, _pages([0, 1, 3]))
    _insert(pool, 1, _pages([1, 2]))
    pool.remove(0)
    tensors, pages = dict(pool.factors), _pages([1, 3])
    copied = sum(pool.inserting(0, pages, 10**6))
    assert copied == pages.num_bytes and all(pool.factors[name] is tensor for name, tensor in tensors.items())
    assert [pool.page(0, region) for region in (1, 3)] == [1, 4]
    assert torch.equal(pool.factor("a")[[1, 4]], pages.factors["a"])
    assert (pool.num_bytes, pool.vacant_bytes) == (4 * pool.page_bytes, pool.page_bytes)


def test_pools_that_differ_in_what_is_vacant_differ_in_layout() -> None:
    pool = PagePool(_pages([0]), num_regions=4, max_slots=2, device=CPU)
    _insert(pool, 0, _pages([0, 1]))
    before = pool.layout
    pool.remove(0)
    vacant = pool.layout
    _insert(pool, 0, _pages([1]))
    assert len({before, vacant, pool.layout}) == 3


def test_pools_with_pages_for_the_same_regions_and_slots_have_one_layout() -> None:
    def layout(*owners: tuple[int, list[int]]) -> bytes:
        pool = PagePool(_pages([0]), num_regions=4, max_slots=2, device=CPU)
        for slot, regions in owners:
            _insert(pool, slot, _pages(regions))
        return pool.layout

    assert layout((0, [1, 2]), (1, [0])) == layout((1, [0]), (0, [1, 2]))
    assert len({layout((0, [0, 2])), layout((0, [1, 2])), layout((1, [1, 2])), layout((0, [1, 2, 3])), layout()}) == 5


def test_slots_with_a_page_in_every_region_are_whole() -> None:
    pool = PagePool(_pages([0]), num_regions=2, max_slots=2, device=CPU)
    _insert(pool, 0, _pages([0]))
    _insert(pool, 1, _pages([0, 1]))
    assert pool.whole_slots == {1}


@pytest.mark.parametrize("layout", [FactorLayout(), FactorLayout(16, a_rows_first=True)], ids=["plain", "rows first"])
def test_the_layout_changes_how_factors_lie_but_not_what_they_are(layout: FactorLayout) -> None:
    torch.manual_seed(0)
    pairs = [LoraPair(torch.randn(3, 12), torch.randn(20, 3), 0.5) for _ in range(2)]
    expert = ExpertLora(*pairs, down=LoraPair(torch.randn(3, 20), torch.randn(12, 3), 2.0))
    pages = _expert_pages(layout.padded_rank(3), {5: expert}, torch.float32, layout)
    pool = PagePool(pages, num_regions=8, max_slots=1, device=CPU)
    _insert(pool, 0, pages)
    rank = 16 if layout.a_rows_first else 8
    assert pool.factors["a13"].shape == ((1, 2 * rank, 12) if layout.a_rows_first else (1, 12, 2 * rank))
    a_gate, a_up = pool.factor("a13")[0].split(rank, dim=1)
    torch.testing.assert_close(a_gate @ pool.factor("b_gate")[0], 0.5 * (pairs[0].b @ pairs[0].a).T)
    torch.testing.assert_close(a_up @ pool.factor("b_up")[0], 0.5 * (pairs[1].b @ pairs[1].a).T)
    assert pool.factor("a2").shape == (1, 20, rank)


def test_factors_that_overflow_the_compute_dtype_are_refused_by_module() -> None:
    """Rows of others are multiplied with them as zeros, and zero times infinity is not zero."""
    fits = LoraPair(torch.ones(2, 8), torch.full((8, 2), 1e3), 2.0)
    large = LoraPair(torch.ones(2, 8), torch.full((8, 2), 4e4), 2.0)
    experts = {3: {1: ExpertLora(None, None, large)}}
    weights = AdapterWeights({"fits": fits, "large": large}, experts, str, {}, "", (), 0, ())
    to_host_adapter(weights, torch.bfloat16)
    with pytest.raises(AdapterError) as refusal:
        to_host_adapter(weights, torch.float16)
    assert [problem.split(":")[0] for problem in refusal.value.problems] == ["large", "routed experts of layer 3"]
    assert "float16" in refusal.value.problems[0]
