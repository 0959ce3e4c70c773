"""From a path that an operator names to a folder that is certainly inside the adapters root."""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath

from runtime.errors import InvalidRequest, NotFound, Precondition


def resolve_source_path(root: Path | None, source_path: str) -> Path:
    """The folder to load; raises a GraftError unless it lies under `root` with no link on the way or inside."""
    if root is None:
        message = "the server was started without --adapters-root, so adapters cannot be loaded by path"
        raise Precondition(message, reason="ADAPTERS_ROOT_NOT_SET", field="source_path")
    relative = PurePosixPath(source_path)
    if not source_path or "\0" in source_path or relative.is_absolute() or ".." in relative.parts:
        raise _refused("source_path must be a path relative to the adapters root, without '..'")
    folder = root.resolve()
    for part in relative.parts:
        folder = folder / part
        _require_folder(folder, source_path)
    if folder == root.resolve():
        raise _refused("source_path must name a folder below the adapters root")
    _require_no_link(folder, source_path)
    return folder


def display_path(root: Path | None, path: str) -> str:
    """A path as operators know it: relative to the root, or nothing if it lies elsewhere."""
    if root is None or not path:
        return ""
    try:
        return str(Path(path).relative_to(root.resolve()))
    except ValueError:
        return ""


def _require_folder(path: Path, source_path: str) -> None:
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError) as error:
        raise _no_folder(source_path) from error
    if stat.S_ISLNK(mode):
        raise _refused(f"{source_path!r} goes through a symbolic link")
    if not stat.S_ISDIR(mode):
        raise _refused(f"{source_path!r} is not a folder")


def _require_no_link(folder: Path, source_path: str) -> None:
    try:
        links = [entry.name for entry in folder.iterdir() if entry.is_symlink()]
    except FileNotFoundError as error:
        raise _no_folder(source_path) from error
    except OSError as error:
        message = f"the files of {source_path!r} cannot be listed ({error.strerror}): let the server read them"
        raise Precondition(message, reason="ADAPTER_REFUSED", field="source_path") from error
    if links:
        raise _refused(f"{source_path}/{links[0]} is a symbolic link")


def _no_folder(source_path: str) -> NotFound:
    message = f"there is no folder {source_path!r} under the adapters root"
    return NotFound(message, reason="ADAPTER_PATH_NOT_FOUND", field="source_path")


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="PATH_NOT_ALLOWED", field="source_path")
