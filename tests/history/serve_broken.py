"""`graft serve` with a defect of `broken` in its engine: `python -m tests.history.serve_broken DEFECT serve ...`."""

from __future__ import annotations

import sys
from functools import partial

from runtime import cli
from runtime.commands import serve
from tests.history.broken import DEFECTS


def main(defect: str, *arguments: str) -> int:
    """As `graft`, with another engine."""
    name = f"{DEFECTS[defect].__module__}:{defect}"
    serve.serve = partial(serve.serve, engine_class=name)  # type: ignore[attr-defined]
    return cli.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
