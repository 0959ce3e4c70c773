"""Names, generations and aliases: what a load, a replacement and an unload change, and what they must not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from runtime.adapters.info import AdapterInfo, AdapterState
from runtime.adapters.record import AdapterRecord
from runtime.errors import AlreadyExists, Conflict, DeadlineExceeded, Exhausted, InvalidRequest, NotFound
from tests.adapters.conftest import MakeStore, StoreDriver

Files = dict[str, Path]


def _ready(reply: object) -> AdapterInfo:
    assert isinstance(reply, AdapterInfo), reply
    return reply


def _generations(store: StoreDriver, name: str) -> list[tuple[int, str]]:
    return [(info.generation, str(info.state)) for info in store.store.infos() if info.name == name]


def test_a_replacement_is_a_new_generation_and_the_old_one_runs_to_its_end(make: MakeStore, files: Files) -> None:
    store = make()
    store.load("x", files["one"])
    old = store.store.acquire("x")
    info = _ready(store.load("x", files["two"], replace=True))
    new = store.store.acquire("x")
    assert (old.generation, new.generation, info.generation) == (1, 2, 2)
    assert old.is_resident and new.is_resident and old.slot != new.slot
    assert _generations(store, "x") == [(1, "DRAINING"), (2, "READY")]
    both = store.store.pages.num_bytes
    store.store.release(old)
    assert _generations(store, "x") == [(2, "READY")]
    assert store.store.pages.num_bytes == info.device_bytes == both // 2


def test_until_it_is_ready_requests_get_the_old_generation(make: MakeStore, files: Files) -> None:
    store = make()
    store.load("x", files["one"])
    store.start("x", files["two"], replace=True)
    assert store.store.acquire("x").generation == 1
    store.wait()
    assert store.store.acquire("x").generation == 2


def test_a_replacement_that_fails_leaves_the_old_generation_and_no_bytes(
    make: MakeStore, files: Files, tmp_path: Path
) -> None:
    store = make()
    before = _ready(store.load("x", files["one"]))
    (tmp_path / "adapter_config.json").write_text("{}")
    num_bytes, host_bytes = store.store.pages.num_bytes, store.store.host_bytes
    assert not isinstance(store.load("x", tmp_path, replace=True), AdapterInfo)
    assert not isinstance(store.load("x", files["two"], "sha256:" + "0" * 64, replace=True), AdapterInfo)
    assert store.store.info("x").generation == before.generation
    assert store.store.acquire("x").digest == before.digest
    assert (store.store.pages.num_bytes, store.store.host_bytes) == (num_bytes, host_bytes)
    assert not store.store.take_failures()[0][0].references


def test_replacing_by_the_same_bytes_changes_nothing(make: MakeStore, files: Files) -> None:
    store = make()
    store.load("x", files["one"])
    again = _ready(store.load("x", files["one"], replace=True))
    assert again.already_loaded and again.generation == 1
    assert _generations(store, "x") == [(1, "READY")]


def test_what_is_registered_and_was_never_read_is_not_taken_for_the_bytes_of_another_folder(
    make: MakeStore, files: Files
) -> None:
    store = make(max_adapters=1)
    first = store.load("x", files["one"], lazy=True)
    refused = store.load("x", files["two"])
    assert isinstance(refused, AlreadyExists) and "files not read yet" in refused.message
    second = store.load("x", files["two"], replace=True)
    assert second.generation > first.generation and not second.already_loaded
    store.load("other", files["three"])
    assert store.store.acquire(f"x@{second.generation}").digest == second.digest
    lazy = store.load("y", files["one"], lazy=True)
    assert store.load("y", files["one"]).generation == lazy.generation


def test_an_expected_generation_that_is_not_live_is_a_conflict_that_names_the_live_one(
    make: MakeStore, files: Files
) -> None:
    store = make()
    store.load("x", files["one"])
    refused = store.load("x", files["two"], replace=True, expected_generation=7)
    assert isinstance(refused, Conflict) and "generation 1 is live" in refused.message
    assert _ready(store.load("x", files["two"], replace=True, expected_generation=1)).generation == 2
    store.unload("x", expected_generation=1)
    assert isinstance(store.wait()[0], Conflict)
    assert isinstance(store.load("nobody", files["two"], expected_generation=1), Conflict)
    store.unload("x", expected_generation=2)
    assert _ready(store.wait()[0]).state == AdapterState.UNLOADED


def test_checking_only_tells_what_would_be_loaded_and_changes_nothing(make: MakeStore, files: Files) -> None:
    store = make()
    live = _ready(store.load("x", files["one"]))
    changes = list(store.changes)
    checked = _ready(store.load("x", files["two"], replace=True, validate_only=True))
    assert (checked.generation, checked.state, checked.slot) == (0, AdapterState.UNSPECIFIED, -1)
    assert checked.tensor_bytes == live.tensor_bytes and checked.digest != live.digest and checked.layers
    assert _ready(store.load("y", files["two"], validate_only=True)).generation == 0
    assert isinstance(store.load("x", files["two"], validate_only=True), AlreadyExists)
    assert store.store.infos() == [store.store.info("x")] and store.changes == changes


def test_a_repeated_request_id_gets_the_first_answer_and_cannot_ask_for_more(make: MakeStore, files: Files) -> None:
    store = make()
    first = store.load("x", files["one"], request_id="r1")
    store.load("x", files["two"], replace=True)
    assert store.load("x", files["one"], request_id="r1") == first
    assert store.store.info("x").generation == 2
    assert isinstance(store.load("x", files["three"], request_id="r1"), InvalidRequest)


def test_a_generation_can_be_named_while_it_is_live_and_not_when_it_is_replaced(make: MakeStore, files: Files) -> None:
    store = make()
    store.load("x", files["one"])
    held = store.store.acquire("x@1")
    store.load("x", files["two"], replace=True)
    assert store.store.acquire("x@2").generation == 2
    with pytest.raises(NotFound, match="no live generation 1: 2 is live"):
        store.store.acquire("x@1")
    assert store.store.info("x@1").state == AdapterState.DRAINING
    store.store.release(held)


def test_an_alias_moves_at_once_and_stands_for_a_name(make: MakeStore, files: Files) -> None:
    store, registry = make(), None
    registry = store.store.registry
    store.load("v1", files["one"])
    store.load("v2", files["two"])
    registry.set_alias("live", "v1")
    before = store.store.acquire("live")
    registry.set_alias("live", "v2")
    assert (before.name, store.store.acquire("live").name) == ("v1", "v2")
    assert store.store.acquire("live@2").name == "v2"
    for alias, target, error in (("v1", "v2", AlreadyExists), ("other", "nobody", NotFound)):
        with pytest.raises(error):
            registry.set_alias(alias, target)
    assert isinstance(store.load("live", files["three"]), AlreadyExists)
    registry.delete_alias("live")
    with pytest.raises(NotFound):
        store.store.acquire("live")


def test_an_alias_whose_adapter_is_gone_says_so(make: MakeStore, files: Files) -> None:
    store = make()
    store.load("v1", files["one"])
    store.store.registry.set_alias("live", "v1")
    store.unload("live")
    store.wait()
    with pytest.raises(NotFound, match="alias 'live' stands for adapter 'v1', which is not loaded"):
        store.store.acquire("live")
    store.load("v1", files["two"])
    assert store.store.acquire("live").generation == 2


def _hold(store: StoreDriver, name: str, path: Path, count: int) -> list[AdapterRecord]:
    store.load(name, path)
    return [store.store.acquire(name) for _ in range(count)]


def test_an_unload_gives_every_byte_back_and_tells_how_many(make: MakeStore, files: Files) -> None:
    store = make()
    old = _hold(store, "x", files["one"], 1)
    store.load("x", files["two"], replace=True)
    taken = store.store.pages.num_bytes, store.store.host_bytes
    store.unload("x")
    assert not store.replies
    store.store.release(old[0])
    freed = _ready(store.wait()[0])
    assert (freed.freed_device_bytes, freed.freed_host_bytes) == taken and min(taken) > 0
    assert (store.store.pages.num_bytes, store.store.host_bytes, store.store.infos()) == (0, 0, [])


def test_a_drain_timeout_tells_how_many_still_run_and_the_draining_goes_on(make: MakeStore, files: Files) -> None:
    store = make()
    held = _hold(store, "x", files["one"], 3)
    store.unload("x", drain_seconds=0.01)
    late = store.wait()[0]
    assert isinstance(late, DeadlineExceeded) and "3 of x@1" in late.message
    with pytest.raises(NotFound):
        store.store.acquire("x")
    store.unload("x")
    for record in held:
        store.store.release(record)
    assert _ready(store.wait()[0]).state == AdapterState.UNLOADED


def test_a_name_can_be_loaded_again_while_its_old_generation_drains(make: MakeStore, files: Files) -> None:
    store = make()
    held = _hold(store, "x", files["one"], 1)
    store.unload("x")
    assert _ready(store.load("x", files["two"])).generation == 2
    assert store.store.acquire("x").generation == 2 and held[0].is_resident
    store.store.release(held[0])
    assert _generations(store, "x") == [(2, "READY")]
    assert _ready(store.wait()[0]).generation == 1


def test_changes_are_told_in_order_and_a_replaced_one_drains_before_the_new_one_is_ready(
    make: MakeStore, files: Files
) -> None:
    store = make()
    store.load("x", files["one"])
    store.load("x", files["two"], replace=True)
    states = [(generation, state) for _, generation, state, _ in store.changes]
    told = [item for place, item in enumerate(states) if place == 0 or states[place - 1] != item]
    assert told == [
        (1, "LOADING"), (1, "READY"), (2, "LOADING"), (1, "DRAINING"), (2, "READY"), (1, "UNLOADED"),
    ]  # fmt: skip


def test_pins_leave_a_place_for_others(make: MakeStore, files: Files) -> None:
    store = make(max_adapters=2)
    assert _ready(store.load("one", files["one"], pinned=True)).pinned
    refused = store.load("two", files["two"], pinned=True)
    assert isinstance(refused, Exhausted) and refused.reason == "PINS_FULL"
    assert [info.name for info in store.store.infos()] == ["one"]
    store.load("two", files["two"])
    assert isinstance(store.pin("two"), Exhausted)
    assert not _ready(store.pin("one", False)).pinned
    assert _ready(store.pin("two")).pinned


def test_a_replacement_inherits_the_pin(make: MakeStore, files: Files) -> None:
    store = make()
    store.load("x", files["one"], pinned=True)
    assert _ready(store.load("x", files["two"], replace=True)).pinned
    assert time.time() - store.store.info("x").created < 60
