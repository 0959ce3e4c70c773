"""What an operator cannot express runs as the reference does, on the device; whoever runs the server is told once."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

_told: set[tuple[str, str]] = set()


def tell_once(operator: str, reason: str) -> None:
    """Log that an operator was replaced by plain PyTorch, and why; the same again says nothing."""
    if (operator, reason) not in _told:
        _told.add((operator, reason))
        logger.warning("%s is replaced by plain PyTorch operations on the device: %s", operator, reason)


def replaced() -> list[tuple[str, str]]:
    """(operator, reason) of everything that was told so far in this process."""
    return sorted(_told)
