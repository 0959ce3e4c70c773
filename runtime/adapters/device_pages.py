"""All adapters' pages on the device: one pool for each module and padded rank in use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from runtime.adapters.host_adapter import HostAdapter
from runtime.adapters.page_pool import HostPages, PagePool
from runtime.adapters.spare_experts import SpareExperts
from runtime.models.deepseek.moe import ExpertGroups


class DevicePages:
    """Pools of the dense modules by name and of the routed experts by layer; empty pools do not exist.

    `spare` holds whole experts that adapters bring. `num_bytes` counts all pages, and these experts.
    """

    def __init__(
        self, num_experts: int, max_slots: int, device: torch.device, spare: Mapping[int, ExpertGroups] | None = None
    ) -> None:
        self.linears: dict[str, dict[int, PagePool]] = {}
        self.experts: dict[int, dict[int, PagePool]] = {}
        self.spare = SpareExperts(spare or {}, num_experts, max_slots, device)
        self.max_slots = max_slots
        self.num_bytes = 0
        self._num_experts = num_experts
        self._device = device

    def install(self, slot: int, adapter: HostAdapter) -> Iterator[None]:
        """Take a slot's spare experts at once, then copy an adapter to the device, yielding after each layer (and
        each whole expert) so that steps can run in between.

        No row of a batch may use the slot before the iterator is exhausted.
        """
        if adapter.replaced:
            self.num_bytes += self.spare.allocate(slot, adapter.replaced)
        return self._copy(slot, adapter)

    def _copy(self, slot: int, adapter: HostAdapter) -> Iterator[None]:
        yield from self.spare.install(slot, adapter.replaced)
        for layer, by_rank in adapter.experts.items():
            for pages in by_rank:
                self._insert(self.experts.setdefault(layer, {}), slot, pages, self._num_experts)
            yield
        for name, pages in adapter.linears.items():
            self._insert(self.linears.setdefault(name, {}), slot, pages, 1)
        yield

    def remove(self, slot: int) -> None:
        """Free every page and spare expert of a slot."""
        self.num_bytes -= self.spare.free(slot)
        for pools in self._groups():
            for rank, pool in list(pools.items()):
                if slot in pool.slots:
                    self.num_bytes -= pool.num_bytes
                    pool.remove(slot)
                    self.num_bytes += pool.num_bytes
                if not pool.slots:
                    del pools[rank]

    def _insert(self, pools: dict[int, PagePool], slot: int, pages: HostPages, num_regions: int) -> None:
        if pages.lora_rank not in pools:
            pools[pages.lora_rank] = PagePool(pages, num_regions, self.max_slots, self._device)
        pools[pages.lora_rank].insert(slot, pages)
        self.num_bytes += pages.num_bytes

    def _groups(self) -> list[dict[int, PagePool]]:
        return [*self.linears.values(), *self.experts.values()]
