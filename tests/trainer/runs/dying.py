"""`python -m runtime.trainer`, killed while it writes a checkpoint: `python -m tests.trainer.runs.dying STEP ...`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from runtime.trainer import checkpoint
from runtime.trainer.__main__ import main


def die_at(step: int) -> None:
    """All tensors are on disk, the list of files and the rename are missing."""
    finish = checkpoint._finish

    def finish_or_die(partial: Path, path: Path, state: Any) -> None:
        if state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(partial, path, state)

    checkpoint._finish = finish_or_die


if __name__ == "__main__":
    die_at(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
