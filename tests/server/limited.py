"""`graft` under limits of the system: `python -m tests.server.limited [LIMIT ...] serve ...`.

`no-files`: no process of it can write a byte to a file. `no-override`: file permissions hold even for root.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

LIMITS = ("no-files", "no-override")
PR_CAPBSET_DROP = 24
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


def main(arguments: list[str]) -> None:
    """Become that process."""
    while arguments[0] in LIMITS:
        limit = arguments.pop(0)
        if limit == "no-files":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        elif os.geteuid() == 0:
            for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
                if ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
                    raise OSError(ctypes.get_errno(), "root keeps its right to read every file")
    os.execv(sys.executable, [sys.executable, "-m", "runtime.cli", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
