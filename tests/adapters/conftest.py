"""An adapter store without an engine around it, and adapter files for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.adapters.info import AdapterInfo
from runtime.adapters.reading_process import ReadingProcess
from runtime.adapters.record import AdapterRecord
from runtime.adapters.store import AdapterStore, StoreLimits
from runtime.engine.messages import CallId, LoadAdapter, PinAdapter, UnloadAdapter
from runtime.errors import GraftError
from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.moe import RoutedExperts
from runtime.ops.cpu import CpuOps
from tests.oracle.adapters import AdapterRecipe, write_adapter
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import V3, Shape

ROOMY = 2**30


@pytest.fixture(scope="session")
def base_dir(oracle: Callable[[Shape], Oracle]) -> Path:
    return oracle(V3).path


@pytest.fixture(scope="session")
def files(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five adapters of the same size."""
    folder = tmp_path_factory.mktemp("store")
    recipes = {
        name: AdapterRecipe(("routed_experts", "o_proj"), lora_rank=8, seed=seed)
        for seed, name in enumerate(("one", "two", "three", "four", "five"))
    }
    return {name: write_adapter(base_dir, folder / name, recipe).path for name, recipe in recipes.items()}


class StoreDriver:
    """A store whose replies and changes are collected in order."""

    def __init__(
        self, base_dir: Path, *, max_adapters: int = 8, max_bytes: int = ROOMY, max_host_bytes: int = ROOMY,
        cycle_seconds: float = 1e9, replacement_experts: int = 0, dtype: torch.dtype = torch.float32,
        max_copy_bytes: int = 8 * 2**20, reading_process: bool = False,
    ) -> None:  # fmt: skip
        config = DeepseekConfig.from_dir(base_dir)
        targets = config.adapter_targets()
        placement = Placement(torch.device("cpu"), dtype, CpuOps(), replacement_experts)
        layers = targets.experts if replacement_experts else ()
        spare = {layer: RoutedExperts(layer, config, placement).groups for layer in layers}
        self.woken = threading.Event()
        limits = StoreLimits(
            max_adapters, 128, max_bytes, max_host_bytes, cycle_seconds, max_copy_bytes=max_copy_bytes
        )
        self.store = AdapterStore(targets, limits, placement.device, dtype, self.woken.set, spare=spare,
                                  reading_process=reading_process)  # fmt: skip
        self.replies: list[AdapterInfo | GraftError] = []
        self.changes: list[tuple[str, int, str, int]] = []
        self.store.on_change = lambda info: self.changes.append(
            (info.name, info.generation, str(info.state), info.slot)
        )

    @property
    def reading_process(self) -> ReadingProcess | None:
        folders = self.store.memory.reader.folders
        return folders if isinstance(folders, ReadingProcess) else None

    def start(self, name: str, path: Path, digest: str = "", **options: object) -> None:
        command = LoadAdapter(CallId(1), name, str(path), digest, **options)  # type: ignore[arg-type]
        self.store.load(command, self.replies.append)

    def compose(self, name: str, expression: str, **options: object) -> None:
        command = LoadAdapter(CallId(1), name, expression=expression, **options)  # type: ignore[arg-type]
        self.store.load(command, self.replies.append)

    def force(self, name: str) -> list[AdapterRecord]:
        """Unload by force; returns the generations whose requests have to end."""
        return self.store.unload(UnloadAdapter(CallId(1), name, force=True), self.replies.append)

    def unload(self, name: str, **options: object) -> None:
        self.store.unload(UnloadAdapter(CallId(1), name, **options), self.replies.append)  # type: ignore[arg-type]

    def pin(self, name: str, pinned: bool = True) -> AdapterInfo | GraftError:
        self.store.pin(PinAdapter(CallId(1), name, pinned), self.replies.append)
        return self.wait()[0]

    def wait(self, count: int = 1) -> list[AdapterInfo | GraftError]:
        """The next `count` replies."""
        self.until(lambda: len(self.replies) >= count)
        taken = list(self.replies)
        self.replies.clear()
        return taken

    def until(self, done: Callable[[], bool]) -> None:
        """Advance until it is so."""
        for _ in range(500):
            self.store.advance(whole=True)
            if done():
                return
            self.woken.wait(0.02)
            self.woken.clear()
        raise TimeoutError("the store does not get there")

    def load(self, name: str, path: Path, digest: str = "", **options: object) -> AdapterInfo | GraftError:
        self.start(name, path, digest, **options)
        return self.wait()[0]

    def use(self, name: str) -> None:
        """A request that comes, waits for its adapter, and ends."""
        record = self.store.acquire(name)
        self.until(lambda: record.is_resident)
        self.store.release(record)

    def on_device(self) -> set[str]:
        return {info.name for info in self.store.infos() if info.slot >= 0}

    def in_host_memory(self) -> set[str]:
        return {info.name for info in self.store.infos() if info.host_bytes}


MakeStore = Callable[..., StoreDriver]


@pytest.fixture
def make(base_dir: Path) -> Iterator[MakeStore]:
    made: list[StoreDriver] = []

    def build(**limits: Any) -> StoreDriver:
        made.append(StoreDriver(base_dir, **limits))
        return made[-1]

    yield build
    for item in made:
        item.store.close()
