"""A file that grows by whole pieces: a piece that does not fit on the disk leaves no part behind."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


class AppendFile:
    """Unbuffered appending; every method that writes raises OSError."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """Append all of `data`, or raise OSError with the file as it was."""
        try:
            if os.write(self._fd, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):  # the first error says what is wrong; the next write cuts again
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
