"""Adapters of one engine: loading beside the steps, becoming visible between two steps, draining, freeing."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from loaders.adapter import AdapterTargets, AdapterWeights, load_adapter
from loaders.errors import LoadError
from runtime.adapters.device_pages import DevicePages
from runtime.adapters.host_adapter import HostAdapter, to_host_adapter
from runtime.adapters.info import AdapterInfo, AdapterState
from runtime.adapters.registry import AdapterRecord, AdapterRegistry, Reply
from runtime.errors import Conflict, Exhausted, GraftError, Internal, Precondition


@dataclass(frozen=True)
class StoreLimits:
    """Bounds of the store."""

    max_adapters: int
    max_lora_rank: int
    max_device_bytes: int


@dataclass(frozen=True)
class _Loaded:
    """What the loading thread hands to the engine loop: the result or the error of one file."""

    record: AdapterRecord
    weights: AdapterWeights | None
    host: HostAdapter | None
    error: GraftError | None


class AdapterStore:
    """Owned by the engine loop, which calls every method; only file reading and conversion run in a thread."""

    def __init__(
        self,
        targets: AdapterTargets,
        limits: StoreLimits,
        device: torch.device,
        dtype: torch.dtype,
        wake: Callable[[], None],
    ) -> None:
        num_experts = max((shape.num_experts for shape in targets.experts.values()), default=0)
        self.pages = DevicePages(num_experts, limits.max_adapters, device)
        self._targets = targets
        self._limits = limits
        self._dtype = dtype
        self._wake = wake
        self._registry = AdapterRegistry(limits.max_adapters)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self._loaded: queue.SimpleQueue[_Loaded] = queue.SimpleQueue()
        self._installing: list[tuple[AdapterRecord, Iterator[None]]] = []

    def load(self, name: str, path: str, expected_digest: str, reply: Reply) -> None:
        """Start a load; `reply` is called once, by a later `advance`. The same load under way is joined.

        A name that is ready already is compared by digest: the same bytes succeed, others are refused.
        """
        try:
            record = self._registry.find(name)
            if record is None or record.state is AdapterState.READY:
                self._start(name, path, expected_digest, reply, record)
            elif record.state is AdapterState.LOADING and record.path == path:
                record.load_replies.append(reply)
            else:
                raise Conflict(f"adapter {name!r} is {record.state}: try again later", reason="ADAPTER_BUSY")
        except GraftError as error:
            reply(error)

    def unload(self, name: str, reply: Reply) -> None:
        """Take no new requests for a name; `reply` comes when its memory is free."""
        try:
            record = self._registry.get(name)
            if record.state is AdapterState.LOADING:
                raise Conflict(f"adapter {name!r} is still loading: try again later", reason="ADAPTER_BUSY")
            record.state = AdapterState.DRAINING
            record.unload_replies.append(reply)
            self._free_if_idle(record)
        except GraftError as error:
            reply(error)

    def infos(self) -> list[AdapterInfo]:
        """Snapshots of all adapters by name."""
        return [record.info() for record in self._registry.records()]

    def info(self, name: str) -> AdapterInfo:
        """Snapshot of one adapter; raises NotFound."""
        return self._registry.get(name).info()

    def acquire(self, name: str) -> AdapterRecord:
        """A reference for one request; raises NotFound. Give it back with `release`."""
        return self._registry.acquire(name)

    def release(self, record: AdapterRecord) -> None:
        """Give a request's reference back; the last one of a draining adapter frees it."""
        self._registry.release(record)
        self._free_if_idle(record)

    def advance(self, *, whole: bool) -> None:
        """Between two steps: take finished reads, copy one layer to the device (all of them if `whole`)."""
        while not self._loaded.empty():
            self._accept(self._loaded.get())
        while self._installing:
            record, steps = self._installing[0]
            if next(steps, self) is self:
                self._installing.pop(0)
                self._make_ready(record)
            elif not whole:
                return

    @property
    def is_installing(self) -> bool:
        """Whether copies to the device are under way."""
        return bool(self._installing) or not self._loaded.empty()

    def close(self) -> None:
        """Stop the loading thread after its current file."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, name: str, path: str, digest: str, reply: Reply, live: AdapterRecord | None) -> None:
        """Read the file in the thread; with a live record of this name only its digest is compared."""
        if live is None:
            record = self._registry.create(name, path)
        else:
            record = AdapterRecord(name, live.generation, path)
        record.load_replies.append(reply)
        self._thread.submit(self._read, record, digest)

    def _read(self, record: AdapterRecord, expected_digest: str) -> None:
        """Runs in the thread: every error of the file becomes data for the engine loop."""
        started = time.monotonic()
        try:
            weights = load_adapter(Path(record.path), self._targets, max_lora_rank=self._limits.max_lora_rank)
            if expected_digest and weights.digest != expected_digest:
                raise Precondition(
                    f"adapter {record.name!r} has digest {weights.digest}, expected {expected_digest}",
                    reason="DIGEST_MISMATCH",
                    field="expected_digest",
                )
            host = to_host_adapter(weights, self._dtype)
            record.load_seconds = time.monotonic() - started
            done = _Loaded(record, weights, host, None)
        except GraftError as error:
            done = _Loaded(record, None, None, error)
        except LoadError as error:
            refusal = Precondition(
                f"adapter {record.name!r} is refused: {error}", reason="ADAPTER_REFUSED", problems=error.problems
            )
            done = _Loaded(record, None, None, refusal)
        except Exception as error:  # the thread's result must always arrive, or the caller waits for ever
            unexpected = Internal(f"adapter {record.name!r} could not be read: {error}", reason="ADAPTER_LOAD_FAILED")
            done = _Loaded(record, None, None, unexpected)
        self._loaded.put(done)
        self._wake()

    def _accept(self, loaded: _Loaded) -> None:
        record = loaded.record
        live = self._registry.find(record.name)
        try:
            if loaded.error is not None:
                raise loaded.error
            if loaded.weights is None or loaded.host is None:
                raise Internal("a load without result", reason="ADAPTER_LOAD_FAILED")
            if live is not record:
                self._answer_live(record, live, loaded.weights.digest)
                return
            self._reserve(loaded.host)
            _describe(record, loaded.weights, loaded.host)
            self._installing.append((record, self.pages.install(record.slot, loaded.host)))
        except GraftError as error:
            if live is record:
                record.state = AdapterState.FAILED
                self._registry.forget(record)
            _reply_all(record.load_replies, error)

    def _answer_live(self, record: AdapterRecord, live: AdapterRecord | None, digest: str) -> None:
        """A load of a name that was already there: the same bytes are fine, other bytes are not replaced."""
        if live is None:
            raise Conflict(f"adapter {record.name!r} was unloaded meanwhile: load again", reason="ADAPTER_BUSY")
        self._registry.check_same(live, digest)
        _reply_all(record.load_replies, live.info(already_loaded=True))

    def _reserve(self, host: HostAdapter) -> None:
        installing = sum(record.device_bytes for record, _ in self._installing)
        used, limit = self.pages.num_bytes + installing, self._limits.max_device_bytes
        if used + host.num_bytes > limit:
            raise Exhausted(
                f"adapter memory is full: {host.num_bytes} bytes needed, {used} of {limit} in use; "
                "unload an adapter or raise --adapter-memory-gib",
                reason="ADAPTER_MEMORY_FULL",
            )

    def _make_ready(self, record: AdapterRecord) -> None:
        record.state = AdapterState.READY
        record.host = None
        _reply_all(record.load_replies, record.info())

    def _free_if_idle(self, record: AdapterRecord) -> None:
        if record.state is not AdapterState.DRAINING or record.references:
            return
        self.pages.remove(record.slot)
        record.state = AdapterState.UNLOADED
        record.device_bytes = 0
        self._registry.forget(record)
        _reply_all(record.unload_replies, record.info())


def _describe(record: AdapterRecord, weights: AdapterWeights, host: HostAdapter) -> None:
    leaves = {name.rsplit(".", 1)[-1] for name in weights.linears}
    ranks = [pages.lora_rank for layer in host.experts.values() for pages in layer]
    ranks += [pages.lora_rank for pages in host.linears.values()]
    record.digest = weights.digest
    record.host = host
    record.lora_rank_max = max(ranks, default=0)
    record.num_expert_pages = host.num_expert_pages
    record.target_modules = sorted(leaves) + (["experts"] if host.experts else [])
    record.tensor_bytes = weights.num_bytes
    record.device_bytes = host.num_bytes
    record.warnings = list(weights.warnings)


def _reply_all(replies: list[Reply], answer: AdapterInfo | GraftError) -> None:
    for reply in replies:
        reply(answer)
    replies.clear()
