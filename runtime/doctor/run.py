"""Run checks one by one: does it fit, does it equal the reference, how long does it take. No failure ends the run."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from runtime.doctor.case import BOUNDS, Exact, Prepared, Results, Source
from runtime.doctor.cases import Check
from runtime.ops.base import Ops
from runtime.ops.device_info import memory_bytes, release_memory, synchronise
from runtime.ops.told import replaced

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
MAX_ERROR_TEXT = 600
NUM_SAMPLES, MAX_CALLS, SAMPLE_SECONDS, SLOW_SECONDS = 7, 50, 2e-3, 0.3
# Free memory that a check leaves alone: the allocator rounds up, and operators have workspaces.
SPARE_BYTES, LARGE_BYTES = 2**29, 2**28
CPU = torch.device("cpu")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """What came of one check. `error` is the largest difference relative to the reference's largest number.

    `seconds` is the median of one call. `note` says why a check failed or was skipped; `replaced` names
    operators in whose place plain PyTorch ran, and why.
    """

    name: str
    operation: str
    phase: str
    shapes: str
    dtype: str
    detail: str
    status: str
    needed_bytes: int = 0
    error: float | None = None
    bound: float | None = None
    seconds: float | None = None
    gigabytes_per_second: float | None = None
    teraflops: float | None = None
    note: str = ""
    replaced: Sequence[str] = ()

    @property
    def remark(self) -> str:
        """What is to be said beside the numbers."""
        operators = sorted({line.partition(":")[0] for line in self.replaced})
        plain = f"plain PyTorch for {', '.join(operators)}" if operators else ""
        return "; ".join(text for text in (self.note, plain) if text)


def row_of(check: Check) -> Callable[..., Row]:
    """Makes a check's row of what came of it."""
    return partial(
        Row,
        name=check.name,
        operation=check.case.operation,
        phase=check.case.phase,
        shapes=check.shapes.name,
        dtype=str(check.dtype).removeprefix("torch."),
    )


def run_checks(
    checks: Iterable[Check], ops: Ops, device: torch.device, max_bytes: int | None = None
) -> Iterator[Row]:
    """A row for each check, as it is done; `max_bytes` bounds what one check may take, beside what is free."""
    for check in checks:
        row = run_check(check, ops, device, max_bytes)
        if row.needed_bytes > LARGE_BYTES or row.status == FAILED:
            gc.collect()
            release_memory(device)
        yield row


def run_check(check: Check, ops: Ops, device: torch.device, max_bytes: int | None = None) -> Row:
    """One check; what it raises becomes its row."""
    row, detail, needed = row_of(check), "", 0
    replaced_before = replaced()
    try:
        detail, needed = _needs(check, ops)
        free = memory_bytes(device)[0] - SPARE_BYTES
        allowed = free if max_bytes is None else min(free, max_bytes)
        if needed > allowed:
            note = f"needs {needed:,} bytes, {max(0, allowed):,} may be used"
            return row(detail=detail, status=SKIPPED, needed_bytes=needed, note=note)
        prepared = check.case.build(check.shapes, ops, Source(device, check.dtype))
        error, remark = compare(prepared, device)
        seconds = median_seconds(prepared.timed or prepared.run, device)
    except Exception as problem:
        logger.debug("%s failed", check.name, exc_info=True)
        return row(detail=detail, status=FAILED, needed_bytes=needed, note=text_of(problem))
    bound = 0.0 if prepared.is_copy else BOUNDS[check.dtype]
    return row(
        detail=detail,
        status=PASSED if error <= bound else FAILED,
        needed_bytes=needed,
        error=error,
        bound=bound,
        seconds=seconds,
        gigabytes_per_second=prepared.moved_bytes / seconds / 1e9,
        teraflops=prepared.flops / seconds / 1e12 if prepared.flops else None,
        note="; ".join(remark),
        replaced=sorted(f"{operator}: {reason}" for operator, reason in replaced() - replaced_before),
    )


def _needs(check: Check, ops: Ops) -> tuple[str, int]:
    """What a check works on, and the bytes that it needs, found out without any memory."""
    source = Source(torch.device("meta"), check.dtype)
    prepared = check.case.build(check.shapes, ops, source)
    return prepared.detail, source.num_bytes + prepared.workspace_bytes


def compare(prepared: Prepared, device: torch.device) -> tuple[float, list[str]]:
    """The largest relative difference, and what is to be said of the reference; raises what an operator raises."""
    with torch.no_grad():
        seen = prepared.run()
        synchronise(device)
        try:
            expected, remark = prepared.reference(_exact_on(device)), []
            synchronise(device)
        except Exception as problem:
            if device.type == "cpu":
                raise
            expected = prepared.reference(_exact_on(CPU))
            remark = [f"the reference ran on the CPU, since on the device it failed: {text_of(problem)}"]
    return max(_difference(a, b) for a, b in zip(seen, expected, strict=True)), remark


def _exact_on(device: torch.device) -> Exact:
    def exact(tensor: Tensor) -> Tensor:
        return tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    return exact


def _difference(seen: Tensor, expected: Tensor) -> float:
    """Relative to the largest number; infinite for other shapes and for anything that is not a number."""
    if seen.shape != expected.shape:
        raise ValueError(f"the result has the shape {list(seen.shape)}, the reference {list(expected.shape)}")
    if not seen.numel():
        return 0.0
    wanted = expected.float()
    difference = (seen.to(expected.device).float() - wanted).abs().max().item()
    largest = wanted.abs().max().item()
    error = difference / largest if largest else difference
    return error if error == error else float("inf")


def median_seconds(call: Callable[[], Results | object], device: torch.device) -> float:
    """The median of several samples of one call's time, after a call to warm up; short calls are timed in rows."""
    with torch.no_grad():
        first = _timed(call, device, 1)
        warm = first if first > SLOW_SECONDS else _timed(call, device, 1)
        if warm > SLOW_SECONDS:
            return min(first, warm)
        calls = max(1, min(MAX_CALLS, round(SAMPLE_SECONDS / max(warm, 1e-7))))
        return statistics.median(_timed(call, device, calls) for _ in range(NUM_SAMPLES))


def _timed(call: Callable[[], Results | object], device: torch.device, calls: int) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def text_of(problem: Exception) -> str:
    """An exception in one line."""
    lines = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {lines[:MAX_ERROR_TEXT]}"
