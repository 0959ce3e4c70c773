"""What an operator cannot express runs as the reference does, on the device; whoever runs the server is told once."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger(__name__)

_told: Counter[tuple[str, str]] = Counter()


def tell_once(operator: str, reason: str, instead: str = "plain PyTorch operations on the device") -> None:
    """Log that an operator was replaced, by what, and why; the same again says nothing."""
    _told[operator, reason] += 1
    if _told[operator, reason] == 1:
        logger.warning("%s is replaced by %s: %s", operator, instead, reason)


def replaced() -> Counter[tuple[str, str]]:
    """How often each operator was replaced in this process so far, by (operator, reason)."""
    return _told.copy()
