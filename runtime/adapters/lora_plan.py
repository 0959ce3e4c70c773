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
                pages_L = pool.table[slot + 1, 0].expand(x_LK.shape[0])
                self._ops.lora_add_(y_LN, x_LK, pool.factors["a"], (pool.factors["b"],), pages_L)

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
                    page = int(pool.table[slot + 1, 0])
                    found.append((slice(start, stop), pool.factors["a"][page], pool.factors["b"][page]))
                start = stop
        return found

    def route_keys(self, experts_TE: Tensor) -> Tensor:
        """See StepLora."""
        return experts_TE * (self._pages.max_slots + 1) + self._table_rows_T[:, None]

    def expert_deltas(self, layer: int, rows_M: Tensor, experts_M: Tensor) -> PagedExpertDeltas:
        """See StepLora."""
        table_rows_M = self._table_rows_T.index_select(0, rows_M)
        pools = self._active_pools(self._pages.experts.get(layer, {}).values())
        return PagedExpertDeltas(self._ops, [(pool, pool.table[table_rows_M, experts_M]) for pool in pools])

    def _add_linear_(self, module: str, y: Tensor, x: Tensor, table_rows: Tensor) -> None:
        for pool in self._active_pools(self._pages.linears.get(module, {}).values()):
            self._ops.lora_add_(y, x, pool.factors["a"], (pool.factors["b"],), pool.table[table_rows, 0])

    def _active_pools(self, pools: Iterable[PagePool]) -> list[PagePool]:
        return [pool for pool in pools if pool.slots & self._active]


class PagedExpertDeltas:
    """Implements `layers.lora_site.ExpertDeltas`: for each pool in use the page of every routed row, -1 for none."""

    def __init__(self, ops: Ops, pages_of_pools: list[tuple[PagePool, Tensor]]) -> None:
        self._ops = ops
        self._pages_of_pools = pages_of_pools

    def add_gate_up_(self, y_MN: Tensor, x_MK: Tensor) -> None:
        """See ExpertDeltas."""
        for pool, pages_M in self._pages_of_pools:
            factors = pool.factors
            self._ops.lora_add_(y_MN, x_MK, factors["a13"], (factors["b_gate"], factors["b_up"]), pages_M)

    def add_down_(self, y_MN: Tensor, x_MK: Tensor) -> None:
        """See ExpertDeltas."""
        for pool, pages_M in self._pages_of_pools:
            self._ops.lora_add_(y_MN, x_MK, pool.factors["a2"], (pool.factors["b2"],), pages_M)
