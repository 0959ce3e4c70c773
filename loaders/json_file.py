"""Reading JSON objects from files and bytes, with a size limit and errors that name the file."""

import json
from pathlib import Path
from typing import Any

from loaders.errors import LoadError


def parse_json_object(data: bytes, label: str, error: type[LoadError]) -> dict[str, Any]:
    """The JSON object in `data`; raises `error` naming `label` when it is not one or names a key twice."""

    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1}) if len(keys) < 1000 else ["(some key)"]
            raise error(f"{label}: key {', '.join(twice)} appears twice")
        return result

    try:
        value = json.loads(data, object_pairs_hook=reject_duplicates)
    except LoadError:
        raise
    except (ValueError, RecursionError) as cause:  # ValueError also for a number of thousands of digits
        raise error(f"{label}: not valid JSON ({str(cause)[:120]})") from None
    if not isinstance(value, dict):
        raise error(f"{label}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_object(path: Path, max_bytes: int, error: type[LoadError]) -> dict[str, Any]:
    """The JSON object in the file `path` of at most `max_bytes`; raises `error` naming the file otherwise."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror})") from None
    if len(data) > max_bytes:
        raise error(f"{path}: larger than the allowed {max_bytes} bytes")
    return parse_json_object(data, str(path), error)
