"""Device memory for LoRA factors: pages ordered by region, so that one group list over them serves all adapters.

A region is an expert (or the only region of a dense module); a page holds one adapter's factors for one region.
There are no pages for what an adapter leaves alone: the table maps it to -1 and its rows are never multiplied, so
storage is exact. Pages ascend by (region, slot), which is the order in which the batch sorts its rows.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

NO_PAGE = -1


@dataclass(frozen=True)
class HostPages:
    """An adapter's pages for one pool in host memory: `factors[name]` is [len(regions), rows, columns].

    A's factors, whose names begin with "a", lie transposed, [.., R, K], if `a_rows_first`.
    """

    lora_rank: int
    regions: list[int]
    factors: Mapping[str, Tensor]
    a_rows_first: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(tensor.nbytes for tensor in self.factors.values())


class PagePool:
    """All pages of one module and one padded rank.

    `table[slot + 1, region]` is a page or -1, row 0 is the base. `next_regions_P` and `next_slots_P` say of each page
    where the next one is; after the last one comes (number of regions, `max_slots`). `layout` is equal in pools that
    have pages for the same regions and slots.
    """

    def __init__(self, like: HostPages, num_regions: int, max_slots: int, device: torch.device) -> None:
        self.device = device
        self.lora_rank = like.lora_rank
        self.factors = {
            name: tensor.new_empty((0, *tensor.shape[1:]), device=device) for name, tensor in like.factors.items()
        }
        self.table = torch.full((max_slots + 1, num_regions), NO_PAGE, dtype=torch.int64, device=device)
        self.next_regions_P, self.next_slots_P = torch.zeros(2, 0, dtype=torch.int64, device=device)
        self.layout = b""
        self.slots: frozenset[int] = frozenset()
        self._a_rows_first = like.a_rows_first
        self._owners: list[tuple[int, int]] = []
        self._page_of: dict[tuple[int, int], int] = {}
        self._whole_slots: frozenset[int] = frozenset()

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages on the device."""
        return sum(tensor.nbytes for tensor in self.factors.values())

    @property
    def num_pages(self) -> int:
        """Pages of all slots."""
        return len(self._owners)

    @property
    def whole_slots(self) -> frozenset[int]:
        """Slots that have a page in every region."""
        return self._whole_slots

    def factor(self, name: str) -> Tensor:
        """All pages of one factor, [P, K, R] for A and [P, R, N] for B; a transposed view where it lies so."""
        stored = self.factors[name]
        return stored.transpose(1, 2) if self._a_rows_first and name.startswith("a") else stored

    def page(self, slot: int, region: int) -> int:
        """The page of a slot that has this region, known without asking the device."""
        return self._page_of[region, slot]

    def insert(self, slot: int, pages: HostPages) -> None:
        """Add a slot's pages. The pool is rebuilt, so it holds exactly its pages and stays ordered."""
        added = [(region, slot) for region in pages.regions]
        position = {owner: page for page, owner in enumerate(sorted(self._owners + added))}
        old_index = self._index(position[owner] for owner in self._owners)
        new_index = self._index(position[owner] for owner in added)
        rebuilt = {}
        for name, old in self.factors.items():
            rebuilt[name] = old.new_empty((len(position), *old.shape[1:]))
            rebuilt[name][old_index] = old
            rebuilt[name][new_index] = pages.factors[name].to(self.device)
        # Assigned only when all of it is there: an allocation that fails above leaves the pool as it was.
        self.factors = rebuilt
        self._set_owners(list(position))

    def remove(self, slot: int) -> None:
        """Drop a slot's pages and give their memory back."""
        kept = [page for page, owner in enumerate(self._owners) if owner[1] != slot]
        index = self._index(kept)
        self.factors = {name: old[index] for name, old in self.factors.items()}
        self._set_owners([self._owners[page] for page in kept])

    def _index(self, pages: object) -> Tensor:
        return torch.tensor(list(pages), dtype=torch.int64, device=self.device)  # type: ignore[call-overload]

    def _set_owners(self, owners: list[tuple[int, int]]) -> None:
        """`owners` are (region, slot), ascending."""
        self._owners = owners
        self._page_of = {owner: page for page, owner in enumerate(owners)}
        num_regions = Counter(slot for _, slot in owners)
        self.slots = frozenset(num_regions)
        self._whole_slots = frozenset(slot for slot, count in num_regions.items() if count == self.table.shape[1])
        self.table.fill_(NO_PAGE)
        if owners:
            regions, slots = torch.tensor(owners, device=self.device).unbind(1)
            self.table[slots + 1, regions] = torch.arange(len(owners), device=self.device)
        following = [*owners[1:], (self.table.shape[1], self.table.shape[0] - 1)][: len(owners)]
        next_P2 = torch.tensor(following, dtype=torch.int64, device=self.device).view(-1, 2)
        self.next_regions_P, self.next_slots_P = next_P2.T.contiguous()
        self.layout = array("q", chain.from_iterable(owners)).tobytes()
