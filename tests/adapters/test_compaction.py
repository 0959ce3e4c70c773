"""Memory of pages that adapters have left: used again, or given back, at once when idle and in pieces in traffic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runtime.adapters import compaction
from runtime.adapters.info import AdapterInfo
from runtime.adapters.store import AdapterStore
from runtime.config import EngineConfig
from tests.adapters.conftest import MakeStore, StoreDriver
from tests.oracle.adapters import AdapterRecipe, write_adapter
from tests.oracle.base_models import Oracle
from tests.oracle.driver import driven_engine
from tests.oracle.shapes import V3, Shape


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, which stands still until a test moves it."""
    clock = [1000.0]
    monkeypatch.setattr(compaction.time, "monotonic", lambda: clock[0])
    return clock


def _tensors(store: AdapterStore) -> list[torch.Tensor]:
    groups = [*store.pages.linears.values(), *store.pages.experts.values()]
    return [tensor for pools in groups for pool in pools.values() for tensor in pool.factors.values()]


def _all_bytes(store: AdapterStore) -> int:
    return sum(tensor.nbytes for tensor in _tensors(store))


def _load_in_traffic(store: StoreDriver, name: str, path: Path, **options: object) -> AdapterInfo:
    store.start(name, path, **options)
    while not store.replies:
        store.woken.wait(0.02)
        store.store.advance(whole=False)
    (info,) = store.replies
    store.replies.clear()
    assert isinstance(info, AdapterInfo)
    return info


def test_replacing_an_adapter_again_and_again_in_traffic_allocates_nothing_after_the_first_time(
    make: MakeStore, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction.time, "monotonic", lambda: 1000.0)
    store = make()
    store.load("one", files["one"])
    tensors: list[torch.Tensor] = []
    for turn, name in enumerate(("two", "three", "four", "five")):
        _load_in_traffic(store, "one", files[name], replace=True)
        if turn:
            assert all(a is b for a, b in zip(tensors, _tensors(store.store), strict=True))
        tensors = _tensors(store.store)
        size = store.store.info("one").device_bytes
        assert (store.store.pages.num_bytes, store.store.pages.vacant_bytes) == (size, size)
        assert _all_bytes(store.store) == 2 * size
    store.store.advance(whole=True)
    assert _all_bytes(store.store) == store.store.pages.num_bytes == size


def test_in_traffic_vacant_pages_wait_for_others_and_then_go_piece_by_piece(
    make: MakeStore, files: dict[str, Path], now: list[float]
) -> None:
    store = make(max_copy_bytes=20_000)
    for name in ("one", "two", "three"):
        store.load(name, files[name])
    size = store.store.info("two").device_bytes
    store.unload("two")
    store.store.advance(whole=False)
    assert store.store.pages.vacant_bytes == size and _all_bytes(store.store) == 3 * size
    now[0] += compaction.QUIET_SECONDS - 0.01
    store.store.advance(whole=False)
    assert store.store.pages.vacant_bytes == size and not store.store.memory.has_work
    assert store.store.next_due == pytest.approx(now[0] + 0.01)
    now[0] += 0.02
    vacant = [size]
    while store.store.memory.has_work:
        store.store.advance(whole=False)
        vacant.append(store.store.pages.vacant_bytes)
    assert vacant == sorted(vacant, reverse=True) and len(set(vacant)) > 2 and vacant[-1] == 0
    assert _all_bytes(store.store) == 2 * size and not store.store.can_compact


def test_a_device_without_room_for_compaction_keeps_the_pages_and_tries_again_later(
    make: MakeStore, files: dict[str, Path], now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    for name in ("one", "two"):
        store.load(name, files[name])
    store.unload("two")
    size = store.store.info("one").device_bytes

    def no_room(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as full:
        full.setattr(torch.Tensor, "new_empty", no_room)
        store.store.advance(whole=True)
    assert store.store.pages.vacant_bytes == size and not store.store.can_compact and not store.store.has_work
    now[0] += compaction.RETRY_SECONDS
    assert store.store.can_compact
    store.store.advance(whole=True)
    assert _all_bytes(store.store) == size


def test_vacant_pages_take_no_room_from_an_adapter_of_another_rank(
    make: MakeStore, files: dict[str, Path], base_dir: Path, tmp_path: Path
) -> None:
    recipe = AdapterRecipe(("routed_experts", "o_proj"), lora_rank=16, seed=9)
    other = write_adapter(base_dir, tmp_path / "other", recipe).path
    sizes = make()
    limit = sizes.load("one", files["one"]).device_bytes + sizes.load("other", other).device_bytes
    store = make(max_bytes=limit)
    for name in ("one", "two", "three"):
        store.load(name, files[name])
    for name in ("two", "three"):
        store.unload(name)
    store.replies.clear()
    assert 0 < store.store.pages.vacant_bytes == _all_bytes(store.store) - store.store.pages.num_bytes
    store.start("other", other)
    while not store.replies:
        store.woken.wait(0.02)
        store.store.advance(whole=False)
        assert _all_bytes(store.store) <= limit
    assert store.on_device() == {"one", "other"} and _all_bytes(store.store) == limit


def test_an_engine_whose_last_request_ends_a_drain_gives_the_memory_back(
    oracle: Callable[[Shape], Oracle], files: dict[str, Path]
) -> None:
    base = oracle(V3)
    config = EngineConfig(base.path, dtype="float32", max_model_len=256, kv_cache_tokens=256, adapter_memory_gib=0.05)
    with driven_engine(config) as driver:
        driver.load("one", files["one"])
        driver.load("two", files["two"])
        request = driver.add(base.prompt(4), adapter="two", max_new_tokens=3)
        driver.step()
        driver.start_unload("two")
        while not driver.outcomes[request].ended:
            driver.step()
        store = driver.engine.adapters
        while driver.engine.has_work():
            driver.step()
        assert store.pages.vacant_bytes == 0 and _all_bytes(store) == store.pages.num_bytes
        assert driver.engine.stats().adapter_vacant_bytes == 0
        assert store.pages.num_bytes == driver.show("one").device_bytes


def test_a_newcomer_copies_its_own_pages_and_not_those_of_all_others(
    make: MakeStore, files: dict[str, Path], now: list[float]
) -> None:
    store = make()
    for name in ("one", "two", "three"):
        store.load(name, files[name])
    store.store.advance(whole=True)
    pages = store.store.pages
    assert not pages.has_young
    old = _tensors(store.store)
    size = _load_in_traffic(store, "four", files["one"]).device_bytes
    assert pages.has_young and pages.num_bytes == 4 * size
    assert sum(tensor.nbytes for tensor in _tensors(store.store) if not _is_one_of(tensor, old)) == size
    assert sum(_is_one_of(tensor, old) for tensor in _tensors(store.store)) == len(old)

    assert store.store.next_due == now[0] + compaction.QUIET_SECONDS
    now[0] += compaction.QUIET_SECONDS
    while store.store.memory.has_work:
        store.store.advance(whole=False)
    assert not pages.has_young and pages.num_bytes == 4 * size and pages.vacant_bytes == 0


def test_while_adapters_come_and_go_pages_are_merged_in_time_and_vacant_ones_kept(
    make: MakeStore, files: dict[str, Path], now: list[float]
) -> None:
    store = make(max_copy_bytes=20_000)
    for name in ("one", "two", "three"):
        store.load(name, files[name])
    while store.store.can_compact:
        store.store.advance(whole=True)
    began = now[0]
    pages, size, were_young = store.store.pages, store.store.info("one").device_bytes, []
    while now[0] < began + compaction.MAX_YOUNG_SECONDS + 5:
        _load_in_traffic(store, "comes and goes", files["one"])
        store.unload("comes and goes")
        store.replies.clear()
        now[0] += compaction.QUIET_SECONDS / 2
        for _ in range(1000):
            store.store.advance(whole=False)
        were_young.append(pages.has_young)
        assert pages.vacant_bytes == size
    assert were_young[0] and not were_young[-1]
    assert were_young.count(True) * compaction.QUIET_SECONDS / 2 >= compaction.MAX_YOUNG_SECONDS - 10


def _is_one_of(tensor: torch.Tensor, tensors: list[torch.Tensor]) -> bool:
    return any(tensor is other for other in tensors)


def test_a_merge_that_an_adapter_breaks_off_leaves_time_for_others_before_it_is_tried_again(
    make: MakeStore, files: dict[str, Path], now: list[float]
) -> None:
    store = make(max_copy_bytes=20_000)
    for name in ("one", "two", "three"):
        store.load(name, files[name])
    _load_in_traffic(store, "four", files["one"])
    for _ in range(int(compaction.MAX_YOUNG_SECONDS)):
        now[0] += 1.0
        store.store.memory.device.compaction.note()
    store.store.advance(whole=False)
    assert store.store.memory.has_work and store.store.pages.has_young
    _load_in_traffic(store, "five", files["one"])
    assert store.store.next_due == now[0] + compaction.QUIET_SECONDS and not store.store.memory.has_work
