"""A folder that appears whole or not at all: written beside its place, forced to disk, then renamed."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class WriteError(OSError):
    """Files could not be written; the message names the folder and says what is left of the old one."""


@contextmanager
def replacing_folder(path: Path, own_files: Collection[str] = ()) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes `path` when the block ends without an error.

    An existing folder is replaced only at the end, and only if it holds nothing but `own_files`. Whatever goes wrong,
    it stays as it was and the temporary folder is removed (only a killed process leaves `.NAME.*.partial` behind).
    Raises ValueError if `path` may not be replaced, WriteError if writing fails.
    """
    path = path.resolve()  # of a link, what it points to
    check_replaceable(path, own_files)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _force_folder_to_disk(partial)
        move_into_place(partial, path)
    except OSError as cause:
        reason = cause.strerror or str(cause)
        state = "the folder that was there is unchanged" if path.exists() else "nothing was left there"
        error = WriteError(f"{path}: cannot be written ({reason}); {state}")
        error.errno = cause.errno
        raise error from cause
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(path: Path, own_files: Collection[str]) -> None:
    """Raises ValueError if `path` is a file, or a folder that holds anything but `own_files`."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder to write to")
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in own_files)
    if foreign:
        shown = ", ".join(foreign[:3]) + (" and more" if len(foreign) > 3 else "")
        raise ValueError(f"{path} already holds {shown}, which would be lost: name a new folder, or remove this one")


def _force_folder_to_disk(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for path in (*(os.path.join(parent, name) for name in names), parent):
            force_to_disk(path)


def force_to_disk(path: str | Path) -> None:
    """What was written to a file, or a folder's list of names, outlasts a loss of power; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(partial: Path, path: Path) -> None:
    """Rename a whole folder to `path`, lastingly; a folder that was there may then lie at `partial`, to be removed."""
    if path.exists() and not _exchange(partial, path):
        # Without an exchange there is a moment without `path`; the old folder then lies beside it, whole.
        old = partial.with_suffix(".old")
        path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    elif not path.exists():
        partial.rename(path)
    force_to_disk(path.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system or its file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return bool(rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)
