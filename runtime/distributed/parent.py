"""Processes that were started by another one end with it, also when it is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def end_with_parent(parent: int) -> None:
    """Let the system kill this process when `parent`, which started it, ends in any way; only Linux can.

    Raises SystemExit if that has happened already.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the system was told
        raise SystemExit(f"graft train: process {parent}, which started this one, has ended")
