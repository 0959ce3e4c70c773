"""An adapter's folder becomes pages in host memory: read, checked, hashed, converted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from loaders.adapter import AdapterTargets, load_adapter
from loaders.errors import LoadError
from loaders.replacement_experts import is_esft
from runtime.adapters.host_adapter import FactorLayout, HostAdapter, NewPages, new_pages, to_host_adapter
from runtime.adapters.info import LayerCoverage
from runtime.adapters.record import AdapterFacts
from runtime.adapters.replacement_experts import NO_ROOM, SpareRoom, read_replacement
from runtime.errors import GraftError, Internal, Precondition

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


@dataclass(frozen=True)
class FolderRules:
    """What adapters are read for: the base, the largest rank and bytes of files, the device's type and layout.

    `spare` is the device's room for experts that ESFT adapters bring.
    """

    targets: AdapterTargets
    max_lora_rank: int
    max_bytes: int
    dtype: torch.dtype
    layout: FactorLayout
    spare: SpareRoom = NO_ROOM


class ReadsFolders(Protocol):
    """Belongs to one thread, but for `interrupt`."""

    def start(self) -> None:
        """Get ready; nothing is lost if it is never called."""
        ...

    def read(self, name: str, path: str, digest: str) -> ReadAdapter:
        """Read a folder, whose digest must be the one given unless that is empty. Raises GraftError."""
        ...

    def interrupt(self) -> None:
        """From any thread: end what is under way as soon as possible, and begin nothing more."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class FolderReader:
    """Reads in the calling thread; `allocate` gives memory for the pages, `expect` hears how much it will be about."""

    def __init__(
        self, rules: FolderRules, allocate: NewPages = new_pages, expect: Callable[[int], None] | None = None
    ) -> None:
        self._rules = rules
        self._allocate = allocate
        self._expect = expect

    def start(self) -> None:
        """Always ready."""

    def interrupt(self) -> None:
        """A file under way is read to its end."""

    def close(self) -> None:
        """Nothing is held."""

    def read(self, name: str, path: str, digest: str) -> ReadAdapter:
        """Read a folder, whose digest must be the one given unless that is empty. Raises GraftError."""
        started = time.monotonic()
        read = self._read_esft if is_esft(Path(path)) else self._read_lora
        try:
            own_digest, host, facts = read(name, Path(path), digest)
        except Exception as error:
            raise as_graft_error(name, error) from error
        return ReadAdapter(own_digest, host, facts, time.monotonic() - started)

    def _read_lora(self, name: str, path: Path, digest: str) -> tuple[str, HostAdapter, AdapterFacts]:
        rules = self._rules
        weights = load_adapter(
            path,
            rules.targets,
            max_lora_rank=rules.max_lora_rank,
            max_bytes=rules.max_bytes,
            on_checked=self._checked,
        )
        try:
            host = to_host_adapter(weights, rules.dtype, rules.layout, self._allocate)
        finally:  # files are hashed meanwhile, and the wrong ones are refused for being these
            _require_digest(name, digest, weights.digest)
        return weights.digest, host, facts_of(host, weights.num_bytes, weights.warnings)

    def _read_esft(self, name: str, path: Path, digest: str) -> tuple[str, HostAdapter, AdapterFacts]:
        rules = self._rules
        weights, replaced = read_replacement(
            path, rules.targets, rules.spare, rules.dtype, self._allocate, self._checked
        )
        _require_digest(name, digest, weights.digest)
        host = HostAdapter({}, {}, replaced=replaced)
        return weights.digest, host, facts_of(host, weights.num_bytes, ())

    def _checked(self, num_elements: int) -> None:
        """The headers are fine, and so many numbers are read now."""
        if self._expect is not None:
            self._expect(num_elements * self._rules.dtype.itemsize)


def _require_digest(name: str, expected: str, digest: str) -> None:
    if expected and digest != expected:
        message = f"adapter {name!r} has digest {digest}, expected {expected}"
        raise Precondition(message, reason="DIGEST_MISMATCH", field="expected_digest")


def facts_of(host: HostAdapter, tensor_bytes: int, warnings: Sequence[str]) -> AdapterFacts:
    """What is told of pages; `tensor_bytes` are those of the tensors that they were made of."""
    leaves = {name.rsplit(".", 1)[-1] for name in host.linears}
    replaced = {layer: len(replacement.experts) for layer, replacement in host.replaced.items()}
    adapts_experts = bool(host.experts or host.shared_outer)
    return AdapterFacts(
        lora_rank_max=max((pages.lora_rank for pages in host.all_pages()), default=0),
        num_expert_pages=host.num_expert_pages,
        target_modules=sorted(leaves) + ["experts"] * adapts_experts + ["replaced_experts"] * bool(replaced),
        tensor_bytes=tensor_bytes,
        device_bytes=host.num_bytes,
        layers=[LayerCoverage(layer, count) for layer, count in host.experts_of_layers.items()],
        warnings=printable(warnings),
        replaced=replaced,
        replaced_bytes=host.replaced_bytes,
    )


def as_graft_error(name: str, error: BaseException) -> GraftError:
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
