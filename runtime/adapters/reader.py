"""Reads adapter files beside the engine loop: checks them, hashes the bytes that it read, makes pages of them."""

from __future__ import annotations

import hashlib
import logging
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from loaders.adapter import AdapterTargets, load_adapter
from loaders.errors import LoadError
from loaders.replacement_experts import is_esft
from runtime.adapters.compose import compose
from runtime.adapters.expression import weight_text
from runtime.adapters.host_adapter import FactorLayout, HostAdapter, to_host_adapter
from runtime.adapters.info import LayerCoverage
from runtime.adapters.record import AdapterFacts, Source
from runtime.adapters.replacement_experts import NO_ROOM, SpareRoom, read_replacement
from runtime.errors import Exhausted, GraftError, Internal, Precondition

logger = logging.getLogger(__name__)

MAX_TOLD_PROBLEMS = 100


@dataclass(frozen=True)
class ReadAdapter:
    """What was in a folder, or a sum of adapters, in the form of the device's pages; `part_digests` in their order."""

    digest: str
    host: HostAdapter
    facts: AdapterFacts
    seconds: float
    part_digests: tuple[str, ...] = ()


OnRead = Callable[[ReadAdapter | GraftError], None]


@dataclass(frozen=True)
class ReaderLimits:
    """Files with larger ranks or more bytes are refused, and sums with larger joined ranks or more bytes of pages.

    `spare` is the device's room for experts that ESFT adapters bring.
    """

    max_lora_rank: int
    max_bytes: int
    max_joined_rank: int
    max_sum_bytes: int
    spare: SpareRoom = NO_ROOM


class AdapterReader:
    """One thread; results wait until the engine loop takes them with `deliver`. `wake` is called when one has come."""

    def __init__(
        self,
        targets: AdapterTargets,
        limits: ReaderLimits,
        dtype: torch.dtype,
        layout: FactorLayout,
        wake: Callable[[], None],
    ) -> None:
        self._targets = targets
        self._limits = limits
        self._dtype = dtype
        self._layout = layout
        self._wake = wake
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self._finished: queue.SimpleQueue[tuple[str, Future[ReadAdapter], OnRead]] = queue.SimpleQueue()

    def read(self, name: str, source: Source, on_read: OnRead) -> None:
        """Start reading; a later `deliver` calls `on_read`, with an error if the digest is not the one given."""
        future = self._thread.submit(self._read, name, source)
        future.add_done_callback(partial(self._hand_over, name, on_read))

    @property
    def has_news(self) -> bool:
        """Whether `deliver` would call anything."""
        return not self._finished.empty()

    def deliver(self) -> None:
        """Tell those that asked about everything that has been read."""
        while not self._finished.empty():
            name, future, on_read = self._finished.get()
            error = future.exception()
            on_read(future.result() if error is None else _as_graft_error(name, error))

    def close(self) -> None:
        """Stop the thread after its current file."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _hand_over(self, name: str, on_read: OnRead, done: Future[ReadAdapter]) -> None:
        """Runs in the thread: the engine loop takes it from here."""
        if not done.cancelled():
            self._finished.put((name, done, on_read))
            self._wake()

    def _read(self, name: str, source: Source) -> ReadAdapter:
        """Runs in the thread."""
        started = time.monotonic()
        if source.parts:
            return self._sum(name, source, started)
        path, limits = Path(source.path), self._limits
        if is_esft(path):
            replacement, replaced = read_replacement(path, self._targets, limits.spare, self._dtype)
            _require_digest(name, source.digest, replacement.digest)
            host = HostAdapter({}, {}, replaced=replaced)
            facts = _facts(host, replacement.num_bytes, ())
            return ReadAdapter(replacement.digest, host, facts, time.monotonic() - started)
        weights = load_adapter(
            path, self._targets, max_lora_rank=limits.max_lora_rank, max_bytes=limits.max_bytes
        )
        _require_digest(name, source.digest, weights.digest)
        host = to_host_adapter(weights, self._dtype, self._layout)
        facts = _facts(host, weights.num_bytes, weights.warnings)
        return ReadAdapter(weights.digest, host, facts, time.monotonic() - started)

    def _sum(self, name: str, source: Source, started: float) -> ReadAdapter:
        """A weighted sum; parts that are not in memory are read, and are not kept. Its bytes are those of its parts."""
        reads: list[ReadAdapter] = []
        for _, part in source.parts:
            reads.append(self._read_part(part))
            if reads[-1].host.replaced:
                message = (
                    f"adapter {name!r}: {part.label} is an ESFT adapter, whose experts take the place of the base's: "
                    "it cannot be a part of a sum, name it alone"
                )
                raise Precondition(message, reason="ADAPTER_REFUSED", field="adapter_id")
            num_bytes = sum(read.host.expanded().num_bytes for read in reads)
            if num_bytes > self._limits.max_sum_bytes:
                message = (
                    f"adapter {name!r} takes {num_bytes} bytes on the device or more, beyond the "
                    f"{self._limits.max_sum_bytes} that all adapters may take: raise --adapter-memory-gib"
                )
                raise Exhausted(message, reason="ADAPTER_MEMORY_FULL")
        weights = [weight for weight, _ in source.parts]
        shares = [(float(weight), read.host) for weight, read in zip(weights, reads, strict=True)]
        host = compose(shares, self._limits.max_joined_rank)
        lines = sorted(f"{weight_text(weight)} {read.digest}" for weight, read in zip(weights, reads, strict=True))
        digest = "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
        warnings = [
            f"{part.label}: {warning}"
            for (_, part), read in zip(source.parts, reads, strict=True)
            for warning in read.facts.warnings
        ]
        facts = _facts(host, sum(read.facts.tensor_bytes for read in reads), warnings)
        digests = tuple(read.digest for read in reads)
        return ReadAdapter(digest, host, facts, time.monotonic() - started, digests)

    def _read_part(self, part: Source) -> ReadAdapter:
        """A part's pages, from memory if they are there; errors name the part."""
        if part.host is not None:
            return ReadAdapter(part.digest, part.host, part.facts, 0.0)
        try:
            return self._read(part.label, part)
        except LoadError as error:
            raise _as_graft_error(part.label, error) from error
        except Precondition as error:
            raise as_changed(part.label, error) from error


def _require_digest(name: str, expected: str, digest: str) -> None:
    if expected and digest != expected:
        message = f"adapter {name!r} has digest {digest}, expected {expected}"
        raise Precondition(message, reason="DIGEST_MISMATCH", field="expected_digest")


def as_changed(label: str, error: GraftError) -> GraftError:
    """A generation stands for its bytes: when the files are others now, it cannot be read again."""
    if error.reason != "DIGEST_MISMATCH":
        return error
    message = f"the files of adapter {label!r} are not those that were loaded: load it again with replace"
    return Precondition(message, reason="ADAPTER_FILES_CHANGED")


def _facts(host: HostAdapter, tensor_bytes: int, warnings: Sequence[str]) -> AdapterFacts:
    leaves = {name.rsplit(".", 1)[-1] for name in host.linears}
    replaced = {layer: len(replacement.experts) for layer, replacement in host.replaced.items()}
    adapts_experts = bool(host.experts or host.shared_outer)
    ranks = [pages.lora_rank for pages in host.all_pages()]
    return AdapterFacts(
        lora_rank_max=max(ranks, default=0),
        num_expert_pages=host.num_expert_pages,
        target_modules=sorted(leaves) + ["experts"] * adapts_experts + ["replaced_experts"] * bool(replaced),
        tensor_bytes=tensor_bytes,
        device_bytes=host.num_bytes,
        layers=[LayerCoverage(layer, count) for layer, count in host.experts_of_layers.items()],
        warnings=printable(warnings),
        replaced=replaced,
        replaced_bytes=host.replaced_bytes,
    )


def _as_graft_error(name: str, error: BaseException) -> GraftError:
    """What the client is told: every problem of a refused file, but no internals of an unexpected failure."""
    if isinstance(error, GraftError):
        return error
    if isinstance(error, LoadError):
        problems = printable(error.problems or (error.headline,))
        (headline,) = printable((error.headline,))
        return Precondition(f"adapter {name!r} is refused: {headline}", reason="ADAPTER_REFUSED", problems=problems)
    logger.error("adapter %r could not be read", name, exc_info=error)
    return Internal(f"adapter {name!r} could not be read; the server's log says why", reason="ADAPTER_LOAD_FAILED")


def printable(texts: Sequence[str]) -> list[str]:
    """Bounded and valid UTF-8: names in a file or a folder can be anything."""
    told = [text.encode("utf-8", "backslashreplace").decode() for text in texts[:MAX_TOLD_PROBLEMS]]
    if len(texts) > MAX_TOLD_PROBLEMS:
        told.append(f"and {len(texts) - MAX_TOLD_PROBLEMS} more")
    return told
