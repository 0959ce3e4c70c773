"""Disk, host memory, device: who is brought, who leaves, and who is safe."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runtime.adapters.info import AdapterInfo, AdapterState
from runtime.errors import Exhausted, Precondition
from tests.adapters.conftest import MakeStore

Files = dict[str, Path]




@pytest.fixture
def num_bytes(make: MakeStore, files: Files) -> int:
    """What each of the adapters takes on the device."""
    info = make().load("one", files["one"])
    assert isinstance(info, AdapterInfo)
    return info.device_bytes


def test_the_least_recently_used_one_leaves_the_device(make: MakeStore, files: Files) -> None:
    store = make(max_adapters=3)
    for name in ("one", "two", "three", "four"):
        store.load(name, files[name])
    assert store.on_device() == {"one", "two", "three"}
    for name in ("two", "one", "three", "four"):
        store.use(name)
    assert store.on_device() == {"one", "three", "four"}
    store.use("one")
    store.use("two")
    assert store.on_device() == {"one", "four", "two"}
    assert store.store.memory.device.counts.evictions == 2


def test_bytes_bound_the_device_like_slots(make: MakeStore, files: Files, num_bytes: int) -> None:
    store = make(max_bytes=int(2.5 * num_bytes))
    for name in ("one", "two", "three"):
        store.load(name, files[name])
        store.use(name)
    assert store.on_device() == {"two", "three"}
    assert store.store.pages.num_bytes == 2 * num_bytes


def test_pinned_and_referenced_ones_stay(make: MakeStore, files: Files) -> None:
    store = make(max_adapters=2)
    store.load("one", files["one"], pinned=True)
    store.load("two", files["two"])
    store.load("three", files["three"])
    held = store.store.acquire("two")
    waiting = store.store.acquire("three")
    for _ in range(20):
        store.store.advance(whole=True)
    assert store.on_device() == {"one", "two"} and not waiting.is_resident
    store.store.release(held)
    store.until(lambda: waiting.is_resident)
    assert store.on_device() == {"one", "three"}


def test_who_waits_longest_is_seated_first(make: MakeStore, files: Files) -> None:
    store = make(max_adapters=1)
    for name in ("one", "two", "three"):
        store.load(name, files[name])
    held = store.store.acquire("one")
    store.until(lambda: held.is_resident)
    waiting = [store.store.acquire(name) for name in ("three", "two")]
    store.store.release(held)
    store.until(lambda: waiting[0].is_resident)
    assert not waiting[1].is_resident
    store.store.release(waiting[0])
    store.until(lambda: waiting[1].is_resident)


def test_a_waiting_adapter_that_nobody_wants_any_more_takes_no_place(make: MakeStore, files: Files) -> None:
    store = make(max_adapters=1)
    for name in ("one", "two"):
        store.load(name, files[name])
    held, given_up = store.store.acquire("one"), store.store.acquire("two")
    store.store.release(given_up)
    store.store.release(held)
    store.store.advance(whole=True)
    assert store.on_device() == {"one"} and store.store.memory.device.num_wanted == 0


def test_host_memory_is_bounded_and_what_leaves_it_is_read_again_when_it_is_named(
    make: MakeStore, files: Files, num_bytes: int
) -> None:
    store = make(max_adapters=1, max_host_bytes=int(2.5 * num_bytes))
    for name in ("one", "two", "three"):
        store.load(name, files[name])
    assert store.in_host_memory() == {"two", "three"} and store.on_device() == {"one"}
    assert store.store.host_bytes == 2 * num_bytes
    store.use("three")
    store.use("two")
    states = {info.name: (str(info.state), info.generation) for info in store.store.infos()}
    assert states["one"] == ("REGISTERED", 1)
    store.use("one")
    assert store.on_device() == {"one"} and store.in_host_memory() == {"two", "one"}
    assert store.store.info("one").generation == 1 and store.store.host_bytes == 2 * num_bytes


def test_an_adapter_that_host_memory_cannot_hold_is_refused_with_the_numbers(
    make: MakeStore, files: Files, num_bytes: int
) -> None:
    refused = make(max_host_bytes=num_bytes - 1).load("one", files["one"])
    assert isinstance(refused, Exhausted) and refused.reason == "ADAPTER_HOST_MEMORY_FULL"
    assert str(num_bytes) in refused.message


def test_a_registered_adapter_is_read_when_a_request_names_it(make: MakeStore, files: Files) -> None:
    store = make()
    info = store.load("one", files["one"], lazy=True)
    assert isinstance(info, AdapterInfo) and (info.state, info.digest) == (AdapterState.REGISTERED, "")
    assert store.store.host_bytes == 0
    store.use("one")
    now = store.store.info("one")
    assert (now.state, now.generation) == (AdapterState.READY, 1) and now.digest.startswith("sha256:")


def test_files_that_were_changed_are_not_served_as_the_old_generation(
    make: MakeStore, files: Files, tmp_path: Path, num_bytes: int
) -> None:
    folder = tmp_path / "changing"
    shutil.copytree(files["one"], folder)
    store = make(max_adapters=1, max_host_bytes=num_bytes)
    store.load("x", folder)
    store.load("two", files["two"])
    store.use("two")
    assert store.store.info("x").state == AdapterState.REGISTERED
    shutil.rmtree(folder)
    shutil.copytree(files["three"], folder)
    waiting = store.store.acquire("x")
    store.until(lambda: bool(store.store.memory.failures))
    ((record, error),) = store.store.take_failures()
    assert record is waiting and isinstance(error, Precondition) and error.reason == "ADAPTER_FILES_CHANGED"
    store.store.release(waiting)
    with pytest.raises(Precondition):
        store.store.acquire("x")
    replaced = store.load("x", folder, replace=True)
    assert isinstance(replaced, AdapterInfo) and replaced.generation == 3
    store.use("x")


def test_a_registered_folder_that_is_broken_fails_its_own_requests_only(
    make: MakeStore, files: Files, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    store = make()
    store.load("broken", tmp_path, lazy=True)
    store.load("one", files["one"])
    waiting = store.store.acquire("broken")
    store.until(lambda: bool(store.store.memory.failures))
    assert store.store.take_failures()[0][0] is waiting
    store.store.release(waiting)
    assert store.store.info("broken").error
    store.use("one")


def test_an_adapter_that_held_its_place_for_the_cycle_yields_it_to_one_that_waits(
    make: MakeStore, files: Files
) -> None:
    """Not before something has run on it, and then as soon as nothing runs; without a cycle it would stay."""
    for cycle_seconds, has_run, moves in ((0.0, True, True), (0.0, False, False), (1000.0, True, False)):
        store = make(max_adapters=1, cycle_seconds=cycle_seconds)
        for name in ("one", "two"):
            store.load(name, files[name])
        first = store.store.acquire("one")
        store.until(lambda: first.is_resident)  # noqa: B023
        first.has_run = has_run
        second = store.store.acquire("two")
        seen = set()
        for _ in range(20):
            store.store.advance(whole=True)
            seen |= store.on_device()
        assert (second.name in seen) is moves


def test_a_yielding_adapter_stays_until_what_runs_on_it_has_ended(make: MakeStore, files: Files) -> None:
    store = make(max_adapters=1, cycle_seconds=0.0)
    for name in ("one", "two"):
        store.load(name, files[name])
    running = store.store.acquire("one")
    store.until(lambda: running.is_resident)
    waiting = store.store.acquire("two")
    running.num_running, running.has_run = 1, True
    for _ in range(20):
        store.store.advance(whole=True)
    assert running.is_yielding and running.is_resident and not waiting.is_resident
    running.num_running = 0
    store.until(lambda: waiting.is_resident)
    assert not running.is_resident


def test_unloading_what_was_never_read_and_what_waits_leaves_nothing(make: MakeStore, files: Files) -> None:
    store = make(max_adapters=1)
    store.load("one", files["one"], lazy=True)
    store.load("two", files["two"])
    held, waiting = store.store.acquire("two"), store.store.acquire("one")
    store.until(lambda: waiting.host is not None)
    store.unload("one")
    store.store.release(waiting)
    store.store.release(held)
    store.unload("two")
    assert all(isinstance(reply, AdapterInfo) for reply in store.wait(2))
    assert (store.store.host_bytes, store.store.pages.num_bytes, store.store.infos()) == (0, 0, [])
    assert not store.store.has_work


def test_what_was_read_for_requests_that_have_gone_and_finds_no_room_is_no_failure(
    make: MakeStore, files: Files, num_bytes: int
) -> None:
    store = make(max_adapters=1, max_host_bytes=int(1.5 * num_bytes))
    store.load("one", files["one"])
    running = store.store.acquire("one")
    store.load("two", files["two"], lazy=True)
    waiting = store.store.acquire("two")
    store.until(lambda: waiting.host is not None)
    store.load("three", files["three"], lazy=True)
    gone = store.store.acquire("three")
    store.until(lambda: store.store.memory._parked is not None)
    store.store.release(gone)
    store.until(lambda: store.store.memory._parked is None)
    assert gone.state is AdapterState.REGISTERED and gone.error is None and store.in_host_memory() == {"two"}
    later = store.store.acquire("three")
    store.store.release(running)
    store.until(lambda: waiting.is_resident)
    store.store.release(waiting)
    store.until(lambda: later.is_resident)
    assert store.store.take_failures() == []
