"""The manifest: a file that lists the adapters that are to be there; the server follows its changes.

A JSON or YAML list of entries: `name`, `path` (relative to the adapters root), and if wanted `digest`, `pinned` and
`aliases`. Adapters that come from the manifest and leave it are unloaded; others are left alone. What is wrong with one
entry is logged and counted and does not touch the others, and it is tried again when the file changes or after a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml

from runtime.adapters.expression import ADAPTER_ID
from runtime.engine.messages import ListAliases, LoadAdapter, PinAdapter, SetAlias, UnloadAdapter
from runtime.errors import GraftError, InvalidRequest
from runtime.server.engine_client import EngineClient
from runtime.server.paths import resolve_source_path

POLL_SECONDS = 2.0
RETRY_SECONDS = 30.0
KEYS = frozenset({"name", "path", "digest", "pinned", "aliases"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One adapter that is to be there. Without a pin it is read when a request names it."""

    name: str
    path: str
    digest: str = ""
    pinned: bool = False
    aliases: tuple[str, ...] = ()


class CountEntry(Protocol):
    """Counts an entry."""

    def __call__(self, *, applied: bool) -> None: ...


class ManifestError(ValueError):
    """The file as a whole cannot be used: nothing is changed."""


class AdapterManifest:
    """Brings the engine's adapters to what the file says, at `reconcile` and in `follow`."""

    def __init__(self, client: EngineClient, file: Path, root: Path | None, count: CountEntry) -> None:
        """`count` hears of every entry that was brought about or failed."""
        self._client = client
        self._file = file
        self._root = root
        self._count = count
        self._applied: dict[str, Entry] = {}
        self._seen: tuple[int, int] | None = None
        self._retry_at = float("inf")

    async def follow(self) -> None:
        """Look at the file again and again, until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self.reconcile()

    async def reconcile(self) -> None:
        """Do what has to be done if the file has changed, or something failed a while ago."""
        try:
            status = await asyncio.to_thread(self._file.stat)
            seen = (status.st_mtime_ns, status.st_size)
            if seen == self._seen and time.monotonic() < self._retry_at:
                return
            self._seen = seen
            text = await asyncio.to_thread(self._file.read_text, "utf-8")
            entries, problems = parse_manifest(text)
        except (OSError, ValueError) as error:
            logger.error("manifest %s is left aside: %s", self._file, error)
            self._count(applied=False)
            return
        for problem in problems:
            logger.error("manifest %s: %s", self._file, problem)
            self._count(applied=False)
        # An entry that cannot be read must not look like one that was taken out.
        is_whole = not problems
        failed = [entry for entry in entries if not await self._try(self._apply(entry), entry.name)]
        if is_whole:
            for name in self._applied.keys() - {entry.name for entry in entries}:
                await self._try(self._remove(name), name)
        self._retry_at = time.monotonic() + RETRY_SECONDS if failed else float("inf")

    async def _try(self, change: Coroutine[Any, Any, None], name: str) -> bool:
        try:
            await change
        except GraftError as error:
            logger.error("manifest %s: adapter %r: %s", self._file, name, "; ".join((error.message, *error.problems)))
            self._count(applied=False)
            return False
        return True

    async def _apply(self, entry: Entry) -> None:
        applied = self._applied.get(entry.name)
        if applied == entry:
            return
        folder = await asyncio.to_thread(resolve_source_path, self._root, entry.path)
        if applied is None or (applied.path, applied.digest) != (entry.path, entry.digest):
            is_there = any(info.name == entry.name for info in await self._client.list_adapters())
            command = partial(
                LoadAdapter, name=entry.name, path=str(folder), expected_digest=entry.digest, replace=True,
                pinned=entry.pinned, lazy=not entry.pinned and not is_there,
            )  # fmt: skip
            await self._client.adapters(command)
        await self._client.adapters(partial(PinAdapter, name=entry.name, pinned=entry.pinned))
        for alias in entry.aliases:
            await self._client.aliases(partial(SetAlias, alias=alias, adapter=entry.name))
        for alias in set(applied.aliases if applied else ()) - set(entry.aliases):
            await self._forget_alias(alias, entry.name)
        self._applied[entry.name] = entry
        self._count(applied=True)

    async def _remove(self, name: str) -> None:
        """The running requests end by themselves; nobody waits for them here."""
        for alias in self._applied[name].aliases:
            await self._forget_alias(alias, name)
        command = partial(UnloadAdapter, name=name, allow_missing=True, drain_seconds=0.0)
        try:
            await self._client.adapters(command)
        except GraftError as error:
            if error.reason != "ADAPTER_DRAINING":
                raise
        del self._applied[name]
        self._count(applied=True)

    async def _forget_alias(self, alias: str, name: str) -> None:
        """Unless it stands for another adapter by now."""
        told = await self._client.aliases(ListAliases)
        if any((item.alias, item.adapter) == (alias, name) for item in told):
            await self._client.aliases(partial(SetAlias, alias=alias))


def parse_manifest(text: str) -> tuple[list[Entry], list[str]]:
    """The entries that can be read, and a sentence for each that cannot; raises ManifestError if it is no list."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ManifestError(f"it is neither JSON nor YAML: {error}") from error
    if not isinstance(content, list):
        raise ManifestError("it must be a list of entries with name and path")
    entries: list[Entry] = []
    problems = []
    for index, item in enumerate(content):
        try:
            entry = _parse_entry(item)
            if entry.name in {other.name for other in entries}:
                raise _wrong(f"the name {entry.name!r} stands there twice")
            entries.append(entry)
        except InvalidRequest as error:
            problems.append(f"entry {index}: {error.message}")
    return entries, problems


def _parse_entry(item: object) -> Entry:
    if not isinstance(item, dict):
        raise _wrong("it must have name and path")
    if unknown := sorted(str(key) for key in item.keys() - KEYS):
        raise _wrong(f"unknown keys {', '.join(unknown)}; known are {', '.join(sorted(KEYS))}")
    name, path, digest = item.get("name"), item.get("path"), item.get("digest", "")
    pinned, aliases = item.get("pinned", False), item.get("aliases", [])
    if not isinstance(aliases, list) or not isinstance(pinned, bool):
        raise _wrong("aliases must be a list of names, and pinned true or false")
    for value in (name, *aliases):
        if not isinstance(value, str) or not ADAPTER_ID.fullmatch(value):
            raise _wrong(f"the name {value!r} must match {ADAPTER_ID.pattern}")
    if not isinstance(path, str) or not isinstance(digest, str):
        raise _wrong("path and digest must be texts")
    return Entry(str(name), path, digest, pinned, tuple(aliases))


def _wrong(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="MANIFEST_INVALID")
