"""What ended a run from outside, in one sentence: memory that is not there, processes that are gone."""

from __future__ import annotations

import re

import torch

from runtime.distributed.mesh import is_lost_connection

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", re.IGNORECASE)
_CAPACITY = re.compile(r"total capacity of ([\d.]+ ?\w+)")
_LESS = (
    "lower micro_batch_rows or data.max_length, set activation_checkpointing: true, or share the model among more "
    "processes with parallel.tp, pp or ep; --dry-run estimates what each of them needs"
)


def describe_failure(error: BaseException) -> str | None:
    """The sentence for the user, None if the error is a defect."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, MemoryError | torch.OutOfMemoryError) or (
            isinstance(cause, RuntimeError) and _OUT_OF_MEMORY.search(str(cause))
        ):
            return f"out of memory{_amount(str(cause))}: {_LESS}"
    if is_lost_connection(error):
        reason = " ".join(str(causes[-1]).split())[:150]
        return (
            f"another process of the run ended or cannot be reached ({reason}); --resume goes on from the newest "
            "checkpoint"
        )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """The error, what caused it, and so on: a pipeline raises its own error because of another."""
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


def _amount(message: str) -> str:
    """How much was asked for, and of how much, where torch says so."""
    asked, capacity = _ASKED.search(message), _CAPACITY.search(message)
    if asked is None:
        return ""
    number, unit = asked.groups()
    text = f"{float(number) / 2**30:,.2f} GiB" if unit.lower() == "bytes" else f"{number} {unit}"
    return f" ({text} more were asked for" + ("" if capacity is None else f", the device has {capacity[1]}") + ")"
