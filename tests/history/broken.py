"""The engine of a storm, and engines with one defect each, of the kinds that the history checker is there for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from runtime.adapters.device_pages import DevicePages
from runtime.adapters.device_tier import DeviceTier
from runtime.adapters.host_adapter import HostAdapter
from runtime.adapters.host_tier import HostTier
from runtime.adapters.record import AdapterRecord
from runtime.adapters.registry import AdapterRegistry
from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.messages import Event, RequestAccepted
from runtime.ops.cpu import CpuOps

STALE_LAYER = 2
# Adapters of the marked base are so small that steps would not see them half copied: here a piece is three copies.
MAX_COPY_BYTES = 3 * 2**19


def whole(config: EngineConfig, progress: Callable[[int, int], None]) -> Engine:
    """Without a defect, and with small pieces."""
    CpuOps.max_copy_bytes = MAX_COPY_BYTES
    return Engine(config, progress)


def page_left_out(config: EngineConfig, progress: Callable[[int, int], None]) -> Engine:
    """A copy to the device leaves a layer out."""
    install = DevicePages.install

    def install_without(self: DevicePages, slot: int, adapter: HostAdapter, max_bytes: float) -> Iterator[None]:
        experts = {layer: pages for layer, pages in adapter.experts.items() if layer != STALE_LAYER}
        return install(self, slot, replace(adapter, experts=experts), max_bytes)

    DevicePages.install = install_without  # type: ignore[method-assign]
    return whole(config, progress)


def page_of_the_one_before(config: EngineConfig, progress: Callable[[int, int], None]) -> Engine:
    """A slot keeps one layer's pages of whoever had it before."""
    remove, install = DevicePages.remove, DevicePages.install

    def remove_most(self: DevicePages, slot: int) -> None:
        stale = self.experts.pop(STALE_LAYER, {})
        remove(self, slot)
        if stale:
            self.experts[STALE_LAYER] = stale

    def install_most(self: DevicePages, slot: int, adapter: HostAdapter, max_bytes: float) -> Iterator[None]:
        is_there = any(slot in pool.slots for pool in self.experts.get(STALE_LAYER, {}).values())
        kept = {layer: pages for layer, pages in adapter.experts.items() if layer != STALE_LAYER or not is_there}
        return install(self, slot, replace(adapter, experts=kept), max_bytes)

    DevicePages.remove, DevicePages.install = remove_most, install_most  # type: ignore[method-assign]
    return whole(config, progress)


def pages_by_name(config: EngineConfig, progress: Callable[[int, int], None]) -> Engine:
    """Host memory is keyed by the name: what replaces an adapter gets the pages of the one before."""
    admit, by_name = HostTier.admit, dict[str, HostAdapter]()

    def admit_by_name(self: HostTier, record: AdapterRecord, host: HostAdapter) -> list[AdapterRecord]:
        return admit(self, record, by_name.setdefault(record.name, host))

    HostTier.admit = admit_by_name  # type: ignore[method-assign]
    return whole(config, progress)


def replaced_but_served_on(config: EngineConfig, progress: Callable[[int, int], None]) -> Engine:
    """Names are looked up in a cache that a replacement does not clear; the old generation is kept for it."""
    get, by_reference = AdapterRegistry.get, dict[str, AdapterRecord]()

    def get_cached(self: AdapterRegistry, reference: str) -> AdapterRecord:
        live = get(self, reference)
        known = by_reference.setdefault(reference, live)
        if known.state != "DRAINING":
            by_reference[reference] = live
            return live
        return known

    AdapterRegistry.get = get_cached  # type: ignore[method-assign]
    return whole(config, progress)


def promoted_too_early(config: EngineConfig, progress: Callable[[int, int], None]) -> Engine:
    """An adapter may run as soon as its copy to the device has begun."""
    seat = DeviceTier.seat

    def seat_at_once(self: DeviceTier, record: AdapterRecord, *, evict: bool) -> bool:
        is_seated = seat(self, record, evict=evict)
        record.is_resident |= is_seated
        return is_seated

    DeviceTier.seat = seat_at_once  # type: ignore[method-assign]
    return whole(config, progress)


class TellsAnotherGeneration(Engine):
    """The trailer names the generation that had the name before."""

    def _emit(self, event: Event) -> None:
        if isinstance(event, RequestAccepted):
            event = self._wrong(event)
        super()._emit(event)

    def _wrong(self, event: RequestAccepted) -> RequestAccepted:
        last: dict[str, tuple[int, int]] = self.__dict__.setdefault("_last_two", {})
        before, current = last.get(event.adapter, (event.generation, event.generation))
        if event.generation != current:
            before, current = current, event.generation
        last[event.adapter] = before, current
        label = event.label.replace(f"@{event.generation}", f"@{before}")
        return replace(event, generation=before, label=label)


def told_by_another_name(config: EngineConfig, progress: Callable[[int, int], None]) -> Engine:
    """See TellsAnotherGeneration."""
    CpuOps.max_copy_bytes = MAX_COPY_BYTES
    return TellsAnotherGeneration(config, progress)


DEFECTS: dict[str, Any] = {
    built.__name__: built
    for built in (page_left_out, page_of_the_one_before, pages_by_name, replaced_but_served_on, promoted_too_early,
                  told_by_another_name)
}  # fmt: skip
