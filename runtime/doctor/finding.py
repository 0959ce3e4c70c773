"""What came of a part of the run that is more than one operation: the demo, a training step, collectives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from runtime.doctor.run import FAILED, text_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """`facts`: what was measured, with units in the names; `note`: why it failed or was not run."""

    name: str
    status: str
    facts: Mapping[str, float | int | str] = field(default_factory=dict)
    note: str = ""


def found(name: str, part: Callable[[], list[Finding]]) -> list[Finding]:
    """A part's findings; what it raises becomes a failed one."""
    try:
        return part()
    except Exception as problem:
        logger.debug("%s failed", name, exc_info=True)
        return [Finding(name, FAILED, note=text_of(problem))]
