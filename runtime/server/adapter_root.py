"""Adapters that nobody loaded: a request that names a folder right under the adapters root registers it."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path

from runtime.adapters.expression import parse_expression
from runtime.adapters.info import AdapterInfo
from runtime.engine.messages import LoadAdapter
from runtime.errors import ErrorKind, GraftError, Precondition
from runtime.server.engine_client import EngineClient
from runtime.server.paths import resolve_source_path

CONFIG_FILE = "adapter_config.json"
GONE = ("UNLOADED", "FAILED", "DRAINING")

logger = logging.getLogger(__name__)


class AdapterRoot:
    """Knows which names the engine has; for one that it has not, it looks under the root."""

    def __init__(self, client: EngineClient, root: Path | None) -> None:
        self._client = client
        self._root = root
        self._generations: dict[str, set[int]] = {}

    def update(self, adapters: list[AdapterInfo]) -> None:
        """The engine has told of adapters."""
        for adapter in adapters:
            generations = self._generations.setdefault(adapter.name, set())
            if adapter.state in GONE:
                generations.discard(adapter.generation)
            else:
                generations.add(adapter.generation)
            if not generations:
                del self._generations[adapter.name]

    async def register(self, expression: str | None) -> None:
        """Register the folder of each name in it, if there is one; what is wrong with it is told when it is read."""
        if self._root is not None and expression is not None:
            for term in parse_expression(expression):
                await self._register_one(term.reference)

    async def _register_one(self, reference: str) -> None:
        if "@" in reference or reference in self._generations:
            return
        folder = await asyncio.to_thread(self._find, reference)
        if folder is None:
            return
        try:
            await self._client.adapters(partial(LoadAdapter, name=reference, path=str(folder), lazy=True))
        except GraftError as error:
            # Another request was first, or the name is an alias: then the engine knows what to do with it.
            if error.kind not in (ErrorKind.ALREADY_EXISTS, ErrorKind.ABORTED):
                raise
            logger.debug("%s was not registered: %s", reference, error.message)

    def _find(self, name: str) -> Path | None:
        """Runs in a thread: the root may be a slow file system."""
        try:
            folder = resolve_source_path(self._root, name)
        except Precondition:
            raise  # it is there, and cannot be read
        except GraftError as error:
            logger.debug("%s is not registered: %s", name, error.message)
            return None
        return folder if (folder / CONFIG_FILE).is_file() else None
