"""`graft serve` with an engine of `broken`, whole or not: `python -m tests.history.serve_storm ENGINE serve ...`."""

from __future__ import annotations

import sys
from functools import partial

from runtime import cli
from runtime.commands import serve


def main(engine: str, *arguments: str) -> int:
    """As `graft`, with another engine."""
    serve.serve = partial(serve.serve, engine_class=f"tests.history.broken:{engine}")  # type: ignore[attr-defined]
    return cli.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
