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
from runtime.adapters.host_adapter import FactorLayout, HostAdapter, NewZeros, new_zeros, to_host_adapter
from runtime.adapters.info import LayerCoverage
from runtime.adapters.record import AdapterFacts
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
    """What adapters are read for: the base, the largest rank and bytes of files, the device's type and layout."""

    targets: AdapterTargets
    max_lora_rank: int
    max_bytes: int
    dtype: torch.dtype
    layout: FactorLayout


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
    """Reads in the calling thread; `zeros` gives the memory of the pages, `expect` hears how much it will be about."""

    def __init__(
        self, rules: FolderRules, zeros: NewZeros = new_zeros, expect: Callable[[int], None] | None = None
    ) -> None:
        self._rules = rules
        self._zeros = zeros
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
        rules = self._rules
        try:
            weights = load_adapter(
                Path(path),
                rules.targets,
                max_lora_rank=rules.max_lora_rank,
                max_bytes=rules.max_bytes,
                on_checked=self._checked,
            )
            if digest and weights.digest != digest:
                message = f"adapter {name!r} has digest {weights.digest}, expected {digest}"
                raise Precondition(message, reason="DIGEST_MISMATCH", field="expected_digest")
            host = to_host_adapter(weights, rules.dtype, rules.layout, self._zeros)
        except Exception as error:
            raise as_graft_error(name, error) from error
        facts = facts_of(host, weights.num_bytes, weights.warnings)
        return ReadAdapter(weights.digest, host, facts, time.monotonic() - started)

    def _checked(self, num_elements: int) -> None:
        """The headers are fine, and so many numbers are read now."""
        if self._expect is not None:
            self._expect(num_elements * self._rules.dtype.itemsize)


def facts_of(host: HostAdapter, tensor_bytes: int, warnings: Sequence[str]) -> AdapterFacts:
    """What is told of pages; `tensor_bytes` are those of the tensors that they were made of."""
    leaves = {name.rsplit(".", 1)[-1] for name in host.linears}
    ranks = [pages.lora_rank for layer in host.experts.values() for pages in layer]
    ranks += [pages.lora_rank for pages in host.linears.values()]
    return AdapterFacts(
        lora_rank_max=max(ranks, default=0),
        num_expert_pages=host.num_expert_pages,
        target_modules=sorted(leaves) + (["experts"] if host.experts else []),
        tensor_bytes=tensor_bytes,
        device_bytes=host.num_bytes,
        layers=[
            LayerCoverage(layer, sum(len(pages.regions) for pages in by_rank))
            for layer, by_rank in sorted(host.experts.items())
        ],
        warnings=printable(warnings),
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
