"""The adapters of one step: which device slot each row belongs to, and the deltas that follow from it.

Shape suffixes: T tokens of the step, M routed rows, B a subset of tokens, L rows of one sequence, K and N sides.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from runtime.adapters.device_pages import DevicePages
from runtime.adapters.page_pool import PagePool
from runtime.ops.base import Ops
from runtime.ops.lora_rows import LoraRows

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
        # Row 0 of every page table is the base's, so slots are shifted by one.
        self._table_rows_T = torch.tensor(self._row_slots, device=device) + 1
        # Routed rows are sorted by expert and by the row's place among the slots of this step, base first.
        places = {slot: place for place, slot in enumerate([BASE_SLOT, *sorted(self._active)])}
        self._table_rows_A = torch.tensor([slot + 1 for slot in places], device=device)
        self._places_T1 = torch.tensor([[places[slot]] for slot in self._row_slots], dtype=torch.int32, device=device)

    def add_linear_(self, module: str, y_TN: Tensor, x_TK: Tensor) -> None:
        """See StepLora."""
        self._add_linear_(module, y_TN, x_TK, self._table_rows_T)

    def add_linear_of_rows_(self, module: str, y_BN: Tensor, x_BK: Tensor, rows_B: Tensor) -> None:
        """See StepLora."""
        if module in self._pages.linears:
            self._add_linear_(module, y_BN, x_BK, self._table_rows_T[rows_B])

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

    def route_keys(self, experts_TE: Tensor) -> tuple[Tensor, int]:
        """See StepLora."""
        keys_of_expert = len(self._active) + 1
        return experts_TE * keys_of_expert + self._places_T1, keys_of_expert

    def expert_deltas(self, layer: int, keys_M: Tensor) -> PagedExpertDeltas:
        """See StepLora."""
        pools = self._active_pools(self._pages.experts.get(layer, {}).values())
        return PagedExpertDeltas(self._ops, [(pool, self._expert_rows(pool, keys_M)) for pool in pools])

    def _expert_rows(self, pool: PagePool, keys_M: Tensor) -> LoraRows:
        """A key is (expert, place of the slot), so a table is read in that order."""

        def of_rows(table: Tensor) -> Tensor:
            return table.index_select(0, self._table_rows_A).T.flatten().index_select(0, keys_M)

        is_whole = pool.whole_slots.issuperset(self._slots)
        return LoraRows(of_rows(pool.table), lambda: of_rows(pool.nearest), pool.num_pages, is_whole)

    def _add_linear_(self, module: str, y: Tensor, x: Tensor, table_rows: Tensor) -> None:
        for pool in self._active_pools(self._pages.linears.get(module, {}).values()):
            rows = self._linear_rows(pool, table_rows)
            self._ops.lora_add_(y, x, pool.factor("a"), (pool.factor("b"),), rows)

    def _linear_rows(self, pool: PagePool, table_rows: Tensor) -> LoraRows:
        is_whole = pool.whole_slots.issuperset(self._slots)
        pages = pool.table[:, 0].index_select(0, table_rows)
        return LoraRows(pages, lambda: pool.nearest[:, 0].index_select(0, table_rows), pool.num_pages, is_whole)

    def _active_pools(self, pools: Iterable[PagePool]) -> list[PagePool]:
        return [pool for pool in pools if pool.slots & self._active]


class PagedExpertDeltas:
    """Implements `layers.lora_site.ExpertDeltas`: for each pool in use the page of every routed row."""

    def __init__(self, ops: Ops, rows_of_pools: list[tuple[PagePool, LoraRows]]) -> None:
        self._ops = ops
        self._rows_of_pools = rows_of_pools

    def add_gate_up_(self, y_MN: Tensor, x_MK: Tensor) -> None:
        """See ExpertDeltas."""
        for pool, rows in self._rows_of_pools:
            bs_PRN = (pool.factor("b_gate"), pool.factor("b_up"))
            self._ops.lora_add_(y_MN, x_MK, pool.factor("a13"), bs_PRN, rows)

    def add_down_(self, y_MN: Tensor, x_MK: Tensor) -> None:
        """See ExpertDeltas."""
        for pool, rows in self._rows_of_pools:
            self._ops.lora_add_(y_MN, x_MK, pool.factor("a2"), (pool.factor("b2"),), rows)
