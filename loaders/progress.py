"""A progress bar for long loads: drawn on a terminal, silent everywhere else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a `progress(done_bytes, total_bytes)` callback that draws a bar on a terminal's standard error."""
    with tqdm(desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=not sys.stderr.isatty()) as bar:

        def update(done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)

        yield update
