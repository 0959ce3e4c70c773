"""Which of a layer's spare groups hold which adapter's experts: weights on the device beside the base's own.

A spare group is allocated for one expert that one adapter replaces; rows of that adapter which go to that expert are
sent to the group instead. Groups of a layer are alike, so any free one will do and nothing fragments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from runtime.adapters.replacement_experts import NO_ROOM, LayerReplacement, SpareRoom
from runtime.models.deepseek.moe import ExpertGroups


class SpareExperts:
    """The spare groups of all layers. `room` is what there is, `num_used_bytes` what adapters take of it."""

    def __init__(
        self, layers: Mapping[int, ExpertGroups], num_experts: int, max_slots: int, device: torch.device
    ) -> None:
        """`layers` hold the base's groups and, from `num_experts` on, the spare ones; none at all is no room."""
        self._layers = {layer: _SpareLayer(groups, num_experts, max_slots, device) for layer, groups in layers.items()}
        self.room = room_of(layers, num_experts)
        self._num_experts = num_experts
        self._bytes_of_slot: dict[int, int] = {}

    @property
    def num_used_bytes(self) -> int:
        """Bytes of the groups that adapters hold."""
        return sum(self._bytes_of_slot.values())

    def missing_layers(self, needed: Mapping[int, int], leaving: Collection[int] = ()) -> list[int]:
        """Layers with too few free groups for so many experts in each, also when the slots `leaving` are gone."""
        return [
            layer
            for layer, count in needed.items()
            if layer not in self._layers or self._layers[layer].num_free(leaving) < count
        ]

    def could_hold(self, needs: Collection[Mapping[int, int]]) -> bool:
        """Whether the groups would do for all of these together, of each how many experts it has in which layer."""
        total: Counter[int] = Counter()
        for needed in needs:
            total.update(needed)
        return all(count <= self.room.num_experts for count in total.values())

    def holds_any(self, slot: int, layers: Collection[int]) -> bool:
        """Whether a slot has groups in one of these layers."""
        return any(slot in self._layers[layer].slots for layer in layers if layer in self._layers)

    def allocate(self, slot: int, adapter: Mapping[int, LayerReplacement]) -> None:
        """Take groups for an adapter, for which there is room."""
        for layer, replacement in adapter.items():
            self._layers[layer].allocate(slot, replacement.experts)
        self._bytes_of_slot[slot] = sum(replacement.num_bytes for replacement in adapter.values())

    def install(self, slot: int, adapter: Mapping[int, LayerReplacement]) -> Iterator[None]:
        """Copy the adapter's experts into its groups, yielding after each so that steps can run in between."""
        for layer, replacement in adapter.items():
            yield from self._layers[layer].install(slot, replacement)

    def free(self, slot: int) -> None:
        """Give a slot's groups back, if it has any."""
        for layer in self._layers.values():
            layer.free(slot)
        self._bytes_of_slot.pop(slot, None)

    def groups_of(self, layer: int, slots: Collection[int]) -> Tensor | None:
        """[slots + 1, E] (int32), flat: the group of each expert by slot + 1, row 0 is the base's.

        None if none of these slots replaces an expert of the layer.
        """
        spare = self._layers.get(layer)
        return spare.table.view(-1) if spare is not None and not spare.slots.isdisjoint(slots) else None


class _SpareLayer:
    """`table[slot + 1, expert]` is the group that rows of a slot go to: the expert's own, or a spare one."""

    def __init__(self, groups: ExpertGroups, num_experts: int, max_slots: int, device: torch.device) -> None:
        self._groups = groups
        self._own_E = torch.arange(num_experts, dtype=torch.int32, device=device)
        self.table = self._own_E.repeat(max_slots + 1, 1)
        self._free = list(range(groups.w13.shape[0] - 1, num_experts - 1, -1))
        self._groups_of_slot: dict[int, list[int]] = {}

    @property
    def slots(self) -> AbstractSet[int]:
        return self._groups_of_slot.keys()

    def num_free(self, leaving: Collection[int]) -> int:
        return len(self._free) + sum(len(self._groups_of_slot.get(slot, ())) for slot in leaving)

    def allocate(self, slot: int, experts: list[int]) -> None:
        if len(experts) > len(self._free):
            raise RuntimeError(f"{len(experts)} experts, but {len(self._free)} spare groups are free")
        taken = self._groups_of_slot[slot] = [self._free.pop() for _ in experts]
        device = self.table.device
        index_N = torch.tensor(experts, dtype=torch.int64, device=device)
        self.table[slot + 1].index_copy_(0, index_N, torch.tensor(taken, dtype=torch.int32, device=device))

    def install(self, slot: int, replacement: LayerReplacement) -> Iterator[None]:
        for place, group in enumerate(self._groups_of_slot[slot]):
            self._groups.w13[group].copy_(replacement.groups.w13[place])
            self._groups.w2[group].copy_(replacement.groups.w2[place])
            yield

    def free(self, slot: int) -> None:
        groups = self._groups_of_slot.pop(slot, None)
        if groups is not None:
            self._free.extend(groups)
            self.table[slot + 1] = self._own_E


def room_of(layers: Mapping[int, ExpertGroups], num_experts: int) -> SpareRoom:
    """What the layers have beyond `num_experts` groups."""
    spare = {layer: groups[num_experts:] for layer, groups in layers.items()}
    if not spare:
        return NO_ROOM
    any_layer = next(iter(spare.values()))
    num_bytes = sum(groups.w13.nbytes + groups.w2.nbytes for groups in spare.values())
    return SpareRoom(any_layer.w13.shape[0], num_bytes, any_layer.w13.shape[3], any_layer.w2.shape[3])
