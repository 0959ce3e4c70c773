"""The adapters of one step: which device slot each row belongs to, and the deltas that follow from it.

Shape suffixes: T tokens of the step, M routed rows, B a subset of tokens, L rows of one sequence, K and N sides.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property

import torch
from torch import Tensor

from runtime.adapters.device_pages import OLD, DevicePages
from runtime.adapters.page_places import NO_PAGE
from runtime.adapters.page_pool import PagePool
from runtime.adapters.shared_outer import SharedOuterDeltas
from runtime.ops.base import Ops
from runtime.ops.lora_rows import LoraRows
from runtime.ops.routing import SortedRows

BASE_SLOT = -1


class LoraPlan:
    """Built once per step from the batch, which is ordered by slot; implements `layers.lora_site.StepLora`."""

    def __init__(
        self, pages: DevicePages, ops: Ops, slots: list[int], num_tokens: list[int], device: torch.device
    ) -> None:
        """`slots[i]` and `num_tokens[i]` describe the step's i-th sequence; slot -1 is the base."""
        self._pages = pages
        self._ops = ops
        self._slots = slots
        self._active = frozenset(slots) - {BASE_SLOT}
        self._row_slots = [slot for slot, count in zip(slots, num_tokens, strict=True) for _ in range(count)]
        self._device = device
        # Routed rows are sorted by expert and by the row's place among the slots of this step, base first.
        self._places = [BASE_SLOT, *sorted(self._active)]
        # By the pools' layouts: what is the same for all layers that have the same pages.
        self._linear_ends: dict[bytes, Tensor] = {}
        self._last_keys: dict[tuple[bytes, int], Tensor] = {}
        self._keyed_pages: dict[tuple[bytes, int], Tensor] = {}

    def add_linear_(self, module: str, y_TN: Tensor, x_TK: Tensor) -> None:
        """See StepLora."""
        for pool in self._active_pools(self._pages.linears.get(module, {}).values()):
            self._ops.lora_add_(y_TN, x_TK, pool.factor("a"), (pool.factor("b"),), self._linear_rows(pool))

    def add_linear_of_rows_(self, module: str, y_BN: Tensor, x_BK: Tensor, rows_B: Tensor) -> None:
        """See StepLora."""
        for pool in self._active_pools(self._pages.linears.get(module, {}).values()):
            pages_B = pool.table[:, 0].index_select(0, self._table_rows_T[rows_B])
            rows = LoraRows.of_pages(pages_B, pool.num_pages, all_have_pages=self._is_whole(pool))
            self._ops.lora_add_(y_BN, x_BK, pool.factor("a"), (pool.factor("b"),), rows)

    def add_linear_of_sequence_(self, module: str, y_LN: Tensor, x_LK: Tensor, sequence: int) -> None:
        """See StepLora."""
        slot = self._slots[sequence]
        for pool in self._pages.linears.get(module, {}).values():
            if slot in pool.slots:
                rows = LoraRows.of_one_page(pool.page(slot, 0), x_LK.shape[0], pool.num_pages, x_LK.device)
                self._ops.lora_add_(y_LN, x_LK, pool.factor("a"), (pool.factor("b"),), rows)

    def factors_of_rows(self, module: str, rows: list[int]) -> list[tuple[slice, Tensor, Tensor]]:
        """See StepLora."""
        found = []
        for pool in self._active_pools(self._pages.linears.get(module, {}).values()):
            start = 0
            for stop in range(1, len(rows) + 1):
                slot = self._row_slots[rows[start]]
                if stop < len(rows) and self._row_slots[rows[stop]] == slot:
                    continue
                if slot in pool.slots:
                    page = pool.page(slot, 0)
                    found.append((slice(start, stop), pool.factor("a")[page], pool.factor("b")[page]))
                start = stop
        return found

    def replace_experts(self, layer: int, experts_TE: Tensor) -> Tensor | None:
        """See StepLora."""
        groups = self._pages.spare.groups_of(layer, self._active)
        if groups is None:
            return None
        num_experts = groups.shape[0] // (self._pages.max_slots + 1)
        index_TE = torch.add(experts_TE, self._table_rows_T1, alpha=num_experts)
        return groups.index_select(0, index_TE.flatten()).view_as(experts_TE)

    def adapts(self, modules: Sequence[str]) -> bool:
        """See StepLora."""
        pools = (pool for module in modules for pool in self._pages.linears.get(module, {}).values())
        return any(pool.slots & self._active for pool in pools)

    def route_keys(self, experts_TE: Tensor) -> tuple[Tensor, int]:
        """See StepLora."""
        keys_of_expert = len(self._active) + 1
        return torch.add(self._places_T1, experts_TE, alpha=keys_of_expert), keys_of_expert

    def expert_deltas(self, layer: int, keys_TE: Tensor, rows: SortedRows, x_TH: Tensor) -> PagedExpertDeltas:
        """See StepLora."""
        pools = self._active_pools(self._pages.experts.get(layer, {}).values())

        @cache
        def keys_M() -> Tensor:
            return keys_TE.flatten().index_select(0, rows.order_M)

        shared = []
        for inner in self._active_pools(self._pages.inner.get(layer, {}).values()):
            outer = self._pages.outer[layer][inner.lora_rank, OLD]
            routed = self._expert_rows(inner, keys_M, rows)
            tokens = self._linear_rows(outer)
            shared.append(SharedOuterDeltas(self._ops, outer, tokens, inner, routed, x_TH, rows))
        paged = [(pool, self._expert_rows(pool, keys_M, rows)) for pool in pools]
        return PagedExpertDeltas(self._ops, paged, shared)

    def _expert_rows(self, pool: PagePool, keys_M: Callable[[], Tensor], rows: SortedRows) -> LoraRows:
        num_keys = rows.counts_G.shape[0]

        def find_pages() -> Tensor:
            return self._pages_of_keys(pool, num_keys).index_select(0, keys_M())

        def find_ends() -> Tensor:
            return rows.ends_G.index_select(0, self._last_keys_of(pool, num_keys))

        return LoraRows(find_pages, find_ends, pool.num_pages, self._is_whole(pool))

    def _pages_of_keys(self, pool: PagePool, num_keys: int) -> Tensor:
        """A key is (expert, place of the slot), so the table is read in that order; experts that adapters bring come
        last and have no pages.
        """
        if (pool.layout, num_keys) not in self._keyed_pages:
            pages = pool.table.index_select(0, self._table_rows_A).T.flatten()
            if num_keys > pages.shape[0]:
                pages = torch.nn.functional.pad(pages, (0, num_keys - pages.shape[0]), value=NO_PAGE)
            self._keyed_pages[pool.layout, num_keys] = pages
        return self._keyed_pages[pool.layout, num_keys]

    def _last_keys_of(self, pool: PagePool, num_keys: int) -> Tensor:
        """[P]: the key before that of the next page; of the last page the last key."""
        if (pool.layout, num_keys) not in self._last_keys:
            places_P = self._last_places_S.index_select(0, pool.next_slots_P)
            keys_P = torch.add(places_P, pool.next_regions_P, alpha=len(self._places))
            if num_keys > pool.table.shape[1] * len(self._places):
                keys_P[-1:] = num_keys - 1
            self._last_keys[pool.layout, num_keys] = keys_P
        return self._last_keys[pool.layout, num_keys]

    def _linear_rows(self, pool: PagePool) -> LoraRows:
        def find_pages() -> Tensor:
            return pool.table[:, 0].index_select(0, self._table_rows_T)

        return LoraRows(find_pages, lambda: self._linear_ends_of(pool), pool.num_pages, self._is_whole(pool))

    def _linear_ends_of(self, pool: PagePool) -> Tensor:
        """[P]: how many tokens come before those of the next page's slot."""
        if pool.layout not in self._linear_ends:
            self._linear_ends[pool.layout] = self._num_rows_before_S.index_select(0, pool.next_slots_P)
        return self._linear_ends[pool.layout]

    # Tensors that not every device asks for; each is copied there once a step. S: slots, and the end of all pages.

    @cached_property
    def _table_rows_T(self) -> Tensor:
        """Rows of page tables; row 0 is the base's, so slots are shifted by one."""
        return torch.tensor([slot + 1 for slot in self._row_slots], device=self._device)

    @cached_property
    def _table_rows_T1(self) -> Tensor:
        return self._table_rows_T[:, None]

    @cached_property
    def _table_rows_A(self) -> Tensor:
        return torch.tensor([slot + 1 for slot in self._places], device=self._device)

    @cached_property
    def _places_T1(self) -> Tensor:
        place_of = {slot: place for place, slot in enumerate(self._places)}
        places = [[place_of[slot]] for slot in self._row_slots]
        return torch.tensor(places, dtype=torch.int32, device=self._device)

    @cached_property
    def _num_rows_before_S(self) -> Tensor:
        """Of each slot the tokens of smaller slots, then all tokens."""
        before = [bisect_left(self._row_slots, slot) for slot in range(self._pages.max_slots)]
        return torch.tensor([*before, len(self._row_slots)], device=self._device)

    @cached_property
    def _last_places_S(self) -> Tensor:
        """Of each slot the last place of a smaller one, then -1: the place before the first of a region."""
        before = [bisect_left(self._places, slot) - 1 for slot in range(self._pages.max_slots)]
        return torch.tensor([*before, -1], device=self._device)

    def _is_whole(self, pool: PagePool) -> bool:
        return pool.whole_slots.issuperset(self._slots)

    def _active_pools(self, pools: Iterable[PagePool]) -> list[PagePool]:
        return [pool for pool in pools if pool.slots & self._active]


class PagedExpertDeltas:
    """Implements `layers.lora_site.ExpertDeltas`: for each pool in use the page of every routed row."""

    def __init__(
        self, ops: Ops, rows_of_pools: list[tuple[PagePool, LoraRows]], shared: list[SharedOuterDeltas]
    ) -> None:
        self._ops = ops
        self._rows_of_pools = rows_of_pools
        self._shared = shared

    def add_gate_up_(self, y_MN: Tensor, x_MK: Tensor) -> None:
        """See ExpertDeltas."""
        for pool, rows in self._rows_of_pools:
            bs_PRN = (pool.factor("b_gate"), pool.factor("b_up"))
            self._ops.lora_add_(y_MN, x_MK, pool.factor("a13"), bs_PRN, rows)
        for deltas in self._shared:
            deltas.add_gate_up_(y_MN)

    def add_down_(self, y_MN: Tensor, x_MK: Tensor) -> None:
        """See ExpertDeltas."""
        for pool, rows in self._rows_of_pools:
            self._ops.lora_add_(y_MN, x_MK, pool.factor("a2"), (pool.factor("b2"),), rows)
        for deltas in self._shared:
            deltas.shrink_down(x_MK)

    def add_combined_(self, y_TH: Tensor, weights_TE: Tensor) -> None:
        """See ExpertDeltas."""
        for deltas in self._shared:
            deltas.add_combined_(y_TH, weights_TE)
