"""JSONL files, one line at a time: each line is an object, or a problem that leaves the lines after it readable."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from loaders.errors import LoadError
from loaders.json_file import parse_json_object
from runtime.trainer.data.errors import DataError, RowError

MAX_LINE_BYTES = 16 << 20


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """The objects of a JSONL file with their line numbers from 1; empty lines are skipped.

    A line that is no JSON object is yielded as the RowError that says why. Raises DataError for an unreadable file.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), 1):
                if line is None:
                    yield number, RowError(f"the line is longer than the allowed {MAX_LINE_BYTES >> 20} MiB")
                elif content := line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
                    yield number, _parse(content)
    except OSError as cause:
        raise DataError(f"{path}: cannot be read ({cause.strerror})") from None


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Lines of a file; None for one that is too long, whose bytes are passed over."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield None


def _parse(content: bytes) -> dict[str, Any] | RowError:
    try:
        # json would also take UTF-16 and half of a surrogate pair.
        text = content.decode("utf-8").encode("utf-8")
    except UnicodeDecodeError as cause:
        return RowError(f"not valid UTF-8 (byte {cause.start} of the line: {cause.reason})")
    try:
        return parse_json_object(text, "the line", LoadError)
    except LoadError as cause:
        return RowError(cause.headline.removeprefix("the line: "))
