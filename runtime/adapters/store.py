"""Adapters of one engine: loading beside the steps, becoming visible between two steps, draining, freeing."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from loaders.adapter import AdapterTargets, AdapterWeights, load_adapter
from loaders.errors import LoadError
from runtime.adapters.device_pages import DevicePages
from runtime.adapters.host_adapter import FactorLayout, HostAdapter, to_host_adapter
from runtime.adapters.info import AdapterInfo, AdapterState
from runtime.adapters.registry import AdapterRecord, AdapterRegistry, Reply
from runtime.errors import Conflict, Exhausted, GraftError, Internal, Precondition

logger = logging.getLogger(__name__)

# Files are often float32 where the device holds 16 bits; larger ones cannot fit, so they are not read at all.
MAX_FILE_BYTES_PER_DEVICE_BYTE = 2
MAX_TOLD_PROBLEMS = 100


@dataclass(frozen=True)
class StoreLimits:
    """Bounds of the store."""

    max_adapters: int
    max_lora_rank: int
    max_device_bytes: int


@dataclass(frozen=True)
class _Read:
    """A file that the thread has read and converted; its digest is checked there too."""

    weights: AdapterWeights
    host: HostAdapter
    seconds: float


class AdapterStore:
    """Owned by the engine loop, which calls every method; only file reading and conversion run in a thread."""

    def __init__(
        self,
        targets: AdapterTargets,
        limits: StoreLimits,
        device: torch.device,
        dtype: torch.dtype,
        wake: Callable[[], None],
        layout: FactorLayout = FactorLayout(),  # noqa: B008 - frozen
    ) -> None:
        num_experts = max((shape.num_experts for shape in targets.experts.values()), default=0)
        self.pages = DevicePages(num_experts, limits.max_adapters, device)
        self._targets = targets
        self._limits = limits
        self._dtype = dtype
        self._layout = layout
        self._wake = wake
        self._registry = AdapterRegistry(limits.max_adapters)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self._reads: queue.SimpleQueue[tuple[AdapterRecord, Future[_Read]]] = queue.SimpleQueue()
        self._installing: list[tuple[AdapterRecord, Iterator[None]]] = []

    def load(self, name: str, path: str, expected_digest: str, reply: Reply) -> None:
        """Start a load; `reply` is called once, by a later `advance`. The same load under way is joined.

        A name that is ready already is compared by digest: the same bytes succeed, others are refused.
        """
        try:
            record = self._registry.find(name)
            if record is None or record.state is AdapterState.READY:
                self._start(name, path, expected_digest, reply, record)
            elif record.state is AdapterState.LOADING and (record.path, record.expected_digest) == (
                path,
                expected_digest,
            ):
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

    @property
    def num_resident(self) -> int:
        """Adapters that are ready, or draining and still in use."""
        return sum(record.state is not AdapterState.LOADING for record in self._registry.records())

    @property
    def host_bytes(self) -> int:
        """Host memory of adapters on their way to the device."""
        return sum(record.host.num_bytes for record, _ in self._installing if record.host is not None)

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
        while not self._reads.empty():
            self._accept(*self._reads.get())
        while self._installing:
            record, steps = self._installing[0]
            try:
                is_done = next(steps, self) is self
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._abandon(record, error)
                continue
            if is_done:
                self._installing.pop(0)
                self._make_ready(record)
            elif not whole:
                return

    @property
    def is_installing(self) -> bool:
        """Whether copies to the device are under way."""
        return bool(self._installing) or not self._reads.empty()

    def close(self) -> None:
        """Stop the loading thread after its current file."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, name: str, path: str, digest: str, reply: Reply, live: AdapterRecord | None) -> None:
        """Read the file in the thread; with a live record of this name only its digest is compared."""
        if live is None:
            record = self._registry.create(name, path, digest)
        else:
            record = AdapterRecord(name, live.generation, path, digest)
        record.load_replies.append(reply)
        future = self._thread.submit(self._read, record)
        future.add_done_callback(lambda done: self._hand_over(record, done))

    def _read(self, record: AdapterRecord) -> _Read:
        """Runs in the thread."""
        started = time.monotonic()
        weights = load_adapter(
            Path(record.path),
            self._targets,
            max_lora_rank=self._limits.max_lora_rank,
            max_bytes=MAX_FILE_BYTES_PER_DEVICE_BYTE * self._limits.max_device_bytes,
        )
        if record.expected_digest and weights.digest != record.expected_digest:
            raise Precondition(
                f"adapter {record.name!r} has digest {weights.digest}, expected {record.expected_digest}",
                reason="DIGEST_MISMATCH",
                field="expected_digest",
            )
        host = to_host_adapter(weights, self._dtype, self._layout)
        return _Read(weights, host, time.monotonic() - started)

    def _hand_over(self, record: AdapterRecord, done: Future[_Read]) -> None:
        """Runs in the thread: the engine loop takes it from here."""
        self._reads.put((record, done))
        self._wake()

    def _accept(self, record: AdapterRecord, done: Future[_Read]) -> None:
        live = self._registry.find(record.name)
        error = _as_graft_error(record.name, done.exception())
        try:
            if error is not None:
                raise error
            read = done.result()
            if live is not record:
                self._answer_live(record, live, read.weights.digest)
                return
            self._reserve(read.host)
            _describe(record, read)
            self._installing.append((record, self.pages.install(record.slot, read.host)))
        except GraftError as refusal:
            self._fail(record, refusal)

    def _answer_live(self, record: AdapterRecord, live: AdapterRecord | None, digest: str) -> None:
        """A load of a name that was already there: the same bytes are fine, other bytes are not replaced."""
        if live is None or live.state is not AdapterState.READY:
            raise Conflict(f"adapter {record.name!r} was unloaded meanwhile: load again", reason="ADAPTER_BUSY")
        self._registry.check_same(live, digest)
        _reply_all(record.load_replies, live.info(already_loaded=True))

    def _reserve(self, host: HostAdapter) -> None:
        used = sum(record.device_bytes for record in self._registry.records())
        limit = self._limits.max_device_bytes
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

    def _abandon(self, record: AdapterRecord, error: Exception) -> None:
        """Undo an install that broke off half-way: everything is as before the load."""
        logger.error("adapter %r could not be copied to the device", record.name, exc_info=error)
        self._installing.pop(0)
        self.pages.remove(record.slot)
        message = f"the device has no room for adapter {record.name!r} ({record.device_bytes} bytes)"
        self._fail(record, Exhausted(message, reason="DEVICE_MEMORY_FULL"))

    def _fail(self, record: AdapterRecord, error: GraftError) -> None:
        """End a load; requests that wait for it find the state FAILED."""
        if self._registry.find(record.name) is record:
            record.state = AdapterState.FAILED
            self._registry.forget(record)
        _reply_all(record.load_replies, error)

    def _free_if_idle(self, record: AdapterRecord) -> None:
        if record.state is not AdapterState.DRAINING or record.references:
            return
        self.pages.remove(record.slot)
        record.state = AdapterState.UNLOADED
        record.device_bytes = 0
        self._registry.forget(record)
        _reply_all(record.unload_replies, record.info())


def _describe(record: AdapterRecord, read: _Read) -> None:
    weights, host = read.weights, read.host
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
    record.warnings = _printable(weights.warnings)
    record.load_seconds = read.seconds


def _as_graft_error(name: str, error: BaseException | None) -> GraftError | None:
    """What the client is told: every problem of a refused file, but no internals of an unexpected failure."""
    if error is None or isinstance(error, GraftError):
        return error
    if isinstance(error, LoadError):
        problems = _printable(error.problems or (error.headline,))
        (headline,) = _printable((error.headline,))
        return Precondition(f"adapter {name!r} is refused: {headline}", reason="ADAPTER_REFUSED", problems=problems)
    logger.error("adapter %r could not be read", name, exc_info=error)
    return Internal(f"adapter {name!r} could not be read; the server's log says why", reason="ADAPTER_LOAD_FAILED")


def _printable(texts: Sequence[str]) -> list[str]:
    """Bounded and valid UTF-8: names in a file or a folder can be anything."""
    told = [text.encode("utf-8", "backslashreplace").decode() for text in texts[:MAX_TOLD_PROBLEMS]]
    if len(texts) > MAX_TOLD_PROBLEMS:
        told.append(f"and {len(texts) - MAX_TOLD_PROBLEMS} more")
    return told


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU's allocator has no class of its own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _reply_all(replies: list[Reply], answer: AdapterInfo | GraftError) -> None:
    for reply in replies:
        reply(answer)
    replies.clear()
