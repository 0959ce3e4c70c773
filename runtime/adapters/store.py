"""Adapters of one engine: who may be named, what is loaded, replaced, pinned, drained and freed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from loaders.adapter import AdapterTargets
from runtime.adapters.device_pages import DevicePages
from runtime.adapters.device_tier import DeviceTier
from runtime.adapters.drains import Drains
from runtime.adapters.expression import is_sum
from runtime.adapters.folder_reader import FolderRules
from runtime.adapters.host_adapter import FactorLayout
from runtime.adapters.host_tier import HostTier
from runtime.adapters.info import AdapterInfo, AdapterState
from runtime.adapters.loads import Loads, Reply
from runtime.adapters.memory import AdapterMemory
from runtime.adapters.reader import AdapterReader, SumLimits
from runtime.adapters.reading_process import folders_reader
from runtime.adapters.record import AdapterRecord
from runtime.adapters.registry import AdapterRegistry
from runtime.adapters.replacement_experts import MAX_FILE_BYTES_PER_DEVICE_BYTE
from runtime.adapters.sums import AdapterSums
from runtime.engine.messages import LoadAdapter, PinAdapter, UnloadAdapter
from runtime.errors import Conflict, Exhausted, GraftError
from runtime.models.deepseek.moe import ExpertGroups

MAX_NAMES = 10_000
MAX_JOINED_RANK = 512


@dataclass(frozen=True)
class StoreLimits:
    """Bounds of the store. `cycle_seconds`: how long an adapter may keep its place while others wait for one.

    `max_lora_rank` is that of an adapter's files; a weighted sum of adapters may have `max_joined_rank`. At most
    `max_copy_bytes` of pages are copied between two steps. `core_share`: see `AdapterReader.lend_cores`.
    """

    max_adapters: int
    max_lora_rank: int
    max_device_bytes: int
    max_host_bytes: int = 2**40
    cycle_seconds: float = math.inf
    max_names: int = MAX_NAMES
    max_joined_rank: int = MAX_JOINED_RANK
    max_copy_bytes: int = 8 * 2**20
    core_share: float = 0.0


class AdapterStore:
    """Owned by the engine loop, which calls every method; files are read in a thread, or in a process of its own.

    `on_change` hears of every change of a state, a place or a pin, in order.
    """

    def __init__(
        self,
        targets: AdapterTargets,
        limits: StoreLimits,
        device: torch.device,
        dtype: torch.dtype,
        wake: Callable[[], None],
        layout: FactorLayout = FactorLayout(),  # noqa: B008 - frozen
        spare: Mapping[int, ExpertGroups] | None = None,
        *,
        reading_process: bool = False,
    ) -> None:
        """`spare`: the base's expert groups by layer, if there are groups after them for experts of ESFT adapters."""
        num_experts = max((shape.num_experts for shape in targets.experts.values()), default=0)
        self.pages = DevicePages(num_experts, limits.max_adapters, device, limits.max_copy_bytes, spare)
        self.registry = AdapterRegistry(limits.max_names)
        self.on_change: Callable[[AdapterInfo], None] = _ignore
        self.have_left = False  # an adapter left the device, or has to: sequences may have to wait for it again
        max_file_bytes = MAX_FILE_BYTES_PER_DEVICE_BYTE * limits.max_device_bytes
        rules = FolderRules(targets, limits.max_lora_rank, max_file_bytes, dtype, layout, self.pages.spare.room)
        folders = folders_reader(rules, own_process=reading_process, steps_need_cores=limits.core_share > 0)
        sum_limits = SumLimits(limits.max_joined_rank, limits.max_device_bytes)
        reader = AdapterReader(folders, sum_limits, wake, limits.core_share)
        tier = DeviceTier(self.pages, limits.max_device_bytes, limits.cycle_seconds, self._moved)
        self.memory = AdapterMemory(reader, HostTier(limits.max_host_bytes), tier, self._changed)
        self._sums = AdapterSums(self.registry, self.memory, self._free_if_idle)
        self._drains = Drains()
        self._loads = Loads(self.registry, self.memory, self._changed, self._free_if_idle, self.check_pins)
        self._limits = limits

    def load(self, command: LoadAdapter, reply: Reply) -> None:
        """Start a load; `reply` is called once, perhaps by a later `advance`. The same load under way is joined."""
        try:
            self._loads.start(command, reply)
        except GraftError as error:
            reply(error)

    def unload(self, command: UnloadAdapter, reply: Reply) -> list[AdapterRecord]:
        """Take no new requests for a name; `reply` comes when its memory is free. Returns the generations that drain.

        An earlier unload of the same name is joined.
        """
        try:
            name = self.registry.resolve(command.name)
            if self._loads.is_changing(name):
                raise Conflict(f"adapter {name!r} is still loading: try again later", reason="ADAPTER_BUSY")
            record = self.registry.find(name)
            if record is None and not self._draining(name):
                self.registry.get(name)
            self.registry.check_generation(name, command.expected_generation)
        except GraftError as error:
            reply(error)
            return []
        if record is not None:
            self.registry.retire(record)
            for changed in (record, *self._sums.retire(record)):
                self._changed(changed)
        draining = self._draining(name)
        self._drains.wait(draining, command.drain_seconds, reply)
        for old in draining:
            self._free_if_idle(old)
        return draining

    def pin(self, command: PinAdapter, reply: Reply) -> None:
        """Keep an adapter on the device, where it is brought if need be, or let it go again."""
        try:
            record = self.registry.get(command.name)
            if command.pinned and not record.pinned:
                self.check_pins(record)
            record.pinned = command.pinned
        except GraftError as error:
            reply(error)
            return
        if record.pinned and record.state is not AdapterState.LOADING:
            self.memory.bring(record)
        elif not record.references:
            self.memory.release(record)
        self._changed(record)
        reply(record.info())

    def check_pins(self, record: AdapterRecord) -> None:
        """Raise Exhausted if one pin more would leave no place for others."""
        pins = [other for other in self.registry.records() if other.pinned and other.name != record.name]
        limit = max(1, self._limits.max_adapters - 1)
        self._check_pinned_experts([*pins, record])
        num_bytes = sum(other.facts.page_bytes for other in pins) + record.facts.page_bytes
        if len(pins) >= limit or num_bytes > self._limits.max_device_bytes:
            raise Exhausted(
                f"adapter {record.name!r} cannot be pinned: {len(pins)} adapters are, {limit} of "
                f"{self._limits.max_adapters} slots may be, and with it they would take {num_bytes} of "
                f"{self._limits.max_device_bytes} bytes",
                reason="PINS_FULL",
            )

    def _check_pinned_experts(self, pins: list[AdapterRecord]) -> None:
        room = self.pages.spare.room.num_experts
        for layer in pins[-1].facts.replaced:
            count = sum(record.facts.replaced.get(layer, 0) for record in pins)
            if count > room:
                raise Exhausted(
                    f"adapter {pins[-1].name!r} cannot be pinned: with it pinned adapters would replace {count} "
                    f"experts of layer {layer}, and there is room for {room}: raise --replacement-experts",
                    reason="PINS_FULL",
                )

    def infos(self) -> list[AdapterInfo]:
        """Snapshots of all generations by name and age."""
        return [record.info() for record in self.registry.records()]

    def info(self, reference: str) -> AdapterInfo:
        """Snapshot of one adapter by NAME, ALIAS, NAME@GENERATION or a sum of such; raises NotFound."""
        if is_sum(reference):
            return self._sums.find(reference).info()
        return self.registry.any_of(reference).info()

    def acquire(self, reference: str) -> AdapterRecord:
        """A reference for one request by NAME, ALIAS, NAME@GENERATION or a sum of such. Give it back with `release`.

        It may still be on its way to the device. Raises NotFound, InvalidRequest and Exhausted, and what its last
        read failed with, if that was just now.
        """
        record = self._sums.get(reference)
        if record.error is not None and time.monotonic() < record.retry_at:
            raise record.error
        tier = self.memory.device if record.is_resident else self.memory.host
        tier.counts.hits += record.is_resident or record.host is not None
        record.references += 1
        record.last_used = time.time()
        if record.state is not AdapterState.LOADING:
            self.memory.bring(record)
        return record

    def release(self, record: AdapterRecord) -> None:
        """Give a request's reference back; the last one of a draining adapter frees it."""
        record.references -= 1
        if not record.references:
            self.memory.release(record)
            self._free_if_idle(record)
            self._sums.follow(record)

    def advance(self, *, whole: bool) -> None:
        """Between two steps: take finished reads, give out places, and copy or compact a piece, or more if `whole`."""
        self.memory.advance(whole=whole)
        self._drains.end_overdue(time.monotonic())

    def lend_cores(self, step_seconds: float) -> None:
        """Between two steps: leave the cores to the reading of adapters for a share of the step before, if need be."""
        self.memory.reader.lend_cores(step_seconds)

    def waits_for_place(self, record: AdapterRecord) -> bool:
        """Whether it waits for room on the device or in host memory, and not for its files."""
        return self.memory.waits(record)

    def no_place(self, record: AdapterRecord, waited_seconds: float) -> Exhausted:
        """What a request is told that has waited for so long in vain."""
        tier = self.memory.device
        message = (
            f"adapter {record.name!r} had no place on the device for {waited_seconds:g} s: {tier.num_resident} of "
            f"{self._limits.max_adapters} slots and {tier.used_bytes} of {tier.max_bytes} bytes are taken, and "
            f"{tier.num_wanted} adapters wait; retry later, or raise --max-adapters or --adapter-memory-gib"
        )
        if record.facts.replaced:
            room = self.pages.spare.room
            message += (
                f"; of the room for replacement experts {self.pages.spare.num_used_bytes} of {room.num_bytes} bytes "
                f"are taken, {room.num_experts} experts a layer: raise --replacement-experts"
            )
        return Exhausted(message, reason="ADAPTER_WAIT_TIMEOUT", retry_seconds=1.0)

    def take_failures(self) -> list[tuple[AdapterRecord, GraftError]]:
        """Adapters that could not be brought to the device: the requests that wait for them have to end."""
        failures, self.memory.failures = self.memory.failures, []
        return failures

    @property
    def has_work(self) -> bool:
        """Whether `advance` would do anything now."""
        return self.memory.has_work or time.monotonic() >= self.next_due

    @property
    def can_compact(self) -> bool:
        """Whether `advance` would give vacant pages back if it is asked to do all at once."""
        return self.memory.device.compaction.can_run

    @property
    def next_due(self) -> float:
        """When a drain or vacant pages have waited long enough, on the monotonic clock; infinity if nothing waits."""
        return min(self._drains.next_due, self.memory.device.compaction.due)

    @property
    def num_resident(self) -> int:
        """Adapters on the device."""
        return self.memory.device.num_resident

    @property
    def host_bytes(self) -> int:
        """Host memory of adapters."""
        return self.memory.host.used_bytes

    def close(self) -> None:
        """Stop the loading thread after its current file."""
        self.memory.reader.close()

    def _moved(self, record: AdapterRecord) -> None:
        """The device tier has let it in or out, or it has to yield."""
        if not record.is_resident:
            self.memory.left_device(record)
        self.have_left |= not record.is_resident or record.is_yielding
        self._changed(record)

    def _changed(self, record: AdapterRecord) -> None:
        self.on_change(record.info())
        self._sums.follow(record)

    def _draining(self, name: str) -> list[AdapterRecord]:
        """What has to end before a name has left the memory: sums that requests have named, and its generations."""
        return self.registry.draining_sums(name) + self.registry.draining(name)

    def _retire_sums(self, part: AdapterRecord) -> None:
        """What requests have named as a sum with this generation is for no new request any more."""
        for record in self._sums.retire(part):
            self._changed(record)
            self._free_if_idle(record)

    def _free_if_idle(self, record: AdapterRecord) -> None:
        if record.state is not AdapterState.DRAINING:
            return
        self._retire_sums(record)
        if record.references:
            return
        host_bytes, device_bytes = self.memory.drop(record)
        record.state = AdapterState.UNLOADED
        self.registry.forget(record)
        info = record.info(freed_host_bytes=host_bytes, freed_device_bytes=device_bytes)
        self.on_change(info)
        self._drains.freed(record, info)


def _ignore(_: AdapterInfo) -> None:
    """Until somebody wants to know."""
