"""Which Graft this is."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """The version of the installed distribution, or "from source" where none is installed."""
    try:
        return metadata.version("graft-moe")
    except metadata.PackageNotFoundError:
        return "from source"
