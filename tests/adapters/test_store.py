"""The life of adapters in a store: loads that join, fail or are refused, draining, bytes that come back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from loaders.adapter import load_adapter
from runtime.adapters.host_adapter import to_host_adapter
from runtime.adapters.info import AdapterInfo, AdapterState
from runtime.adapters.reader import printable
from runtime.adapters.store import AdapterStore
from runtime.errors import AlreadyExists, Conflict, Exhausted, NotFound, Precondition
from runtime.models.deepseek.config import DeepseekConfig
from tests.adapters.conftest import MakeStore


def test_a_load_becomes_ready_with_a_generation_a_digest_and_its_bytes(
    make: MakeStore, files: dict[str, Path], base_dir: Path
) -> None:
    info = make().load("one", files["one"])
    assert isinstance(info, AdapterInfo)
    weights = load_adapter(files["one"], DeepseekConfig.from_dir(base_dir).adapter_targets())
    assert (info.state, info.generation, info.digest) == (AdapterState.READY, 1, weights.digest)
    assert info.device_bytes == to_host_adapter(weights, torch.float32).num_bytes
    assert info.target_modules == ["o_proj", "experts"]


def test_the_same_bytes_again_are_fine_and_other_bytes_are_not_replaced(
    make: MakeStore, files: dict[str, Path]
) -> None:
    store = make()
    first, again = store.load("one", files["one"]), store.load("one", files["one"])
    other = store.load("one", files["two"])
    assert isinstance(first, AdapterInfo) and isinstance(again, AdapterInfo)
    assert again.already_loaded and again.generation == first.generation
    assert isinstance(other, AlreadyExists)
    assert store.store.info("one").digest == first.digest


def test_identical_loads_under_way_are_joined_and_others_turned_away(
    make: MakeStore, files: dict[str, Path]
) -> None:
    store = make()
    store.start("one", files["one"])
    store.start("one", files["one"])
    store.start("one", files["two"])
    conflict, first, joined = store.wait(3)
    assert isinstance(conflict, Conflict)
    assert first == joined


def test_a_failed_load_leaves_no_trace(make: MakeStore, files: dict[str, Path], tmp_path: Path) -> None:
    store = make()
    store.load("one", files["one"])
    before = (store.store.pages.num_bytes, store.store.infos())
    (tmp_path / "adapter_config.json").write_text("{}")
    refused = store.load("broken", tmp_path)
    assert isinstance(refused, Precondition) and refused.problems
    assert isinstance(store.load("three", files["three"], "sha256:" + "0" * 64), Precondition)
    assert (store.store.pages.num_bytes, store.store.infos()) == before
    assert isinstance(store.load("broken", files["two"]), AdapterInfo)


def test_an_adapter_that_the_device_cannot_hold_even_alone_is_refused_with_the_numbers(
    make: MakeStore, files: dict[str, Path]
) -> None:
    one = make().load("one", files["one"])
    assert isinstance(one, AdapterInfo)
    limit = one.device_bytes - 1
    full = make(max_bytes=limit).load("one", files["one"])
    assert isinstance(full, Exhausted)
    assert str(one.device_bytes) in full.message and str(limit) in full.message


def test_what_the_device_has_no_place_for_is_ready_in_host_memory(
    make: MakeStore, files: dict[str, Path]
) -> None:
    one = make().load("one", files["one"])
    assert isinstance(one, AdapterInfo)
    for store in (make(max_bytes=int(1.5 * one.device_bytes)), make(max_adapters=1)):
        store.load("one", files["one"])
        second = store.load("two", files["two"])
        assert isinstance(second, AdapterInfo)
        assert (second.state, second.slot, second.device_bytes) == (AdapterState.READY, -1, 0)
        assert second.host_bytes == one.device_bytes == store.store.pages.num_bytes


def test_an_adapter_in_use_drains_and_its_memory_comes_back_with_the_last_request(
    make: MakeStore, files: dict[str, Path]
) -> None:
    store = make()
    store.load("one", files["one"])
    empty_bytes = 0
    record = store.store.acquire("one")
    store.unload("one")
    assert store.store.info("one").state == AdapterState.DRAINING and not store.replies
    with pytest.raises(NotFound):
        store.store.acquire("one")
    store.store.release(record)
    assert store.store.pages.num_bytes == empty_bytes and store.store.can_compact
    store.store.advance(whole=True)
    assert store.store.pages.vacant_bytes == 0 and _contents(store.store) == []
    assert [reply.state for reply in store.replies if isinstance(reply, AdapterInfo)] == [AdapterState.UNLOADED]
    store.replies.clear()
    again = store.load("one", files["one"])
    assert isinstance(again, AdapterInfo) and again.generation == 2


def _contents(store: AdapterStore) -> list[torch.Tensor]:
    groups = [*store.pages.linears.values(), *store.pages.experts.values()]
    pools = [pool for group in groups for pool in group.values()]
    return [tensor.clone() for pool in pools for tensor in (pool.table, *pool.factors.values())]


@pytest.mark.parametrize("failing_call", [2, 3, 9])
def test_a_device_without_room_leaves_the_others_as_they_were_and_the_next_load_works(
    make: MakeStore, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    """The allocation fails inside a pool's rebuild: between two factors of a page, or a layer later."""
    store = make()
    store.load("two", files["two"])
    before, bytes_before = _contents(store.store), store.store.pages.num_bytes
    allocate, calls = torch.Tensor.new_empty, []

    def allocate_until_full(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == failing_call:
            raise torch.OutOfMemoryError("no room")
        return allocate(tensor, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate_until_full)
    failed = store.load("one", files["one"])
    monkeypatch.undo()
    assert isinstance(failed, Exhausted) and len(calls) >= failing_call
    assert (store.store.pages.num_bytes, store.store.pages.vacant_bytes) == (bytes_before, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, _contents(store.store), strict=True))
    assert isinstance(store.load("one", files["one"]), AdapterInfo)


def test_a_load_with_another_expected_digest_does_not_join(make: MakeStore, files: dict[str, Path]) -> None:
    store = make()
    store.start("one", files["one"])
    store.start("one", files["one"], "sha256:" + "0" * 64)
    conflict, first = store.wait(2)
    assert isinstance(conflict, Conflict) and isinstance(first, AdapterInfo)


def test_a_repeated_load_of_a_name_that_is_unloaded_meanwhile_is_told_to_try_again(
    make: MakeStore, files: dict[str, Path]
) -> None:
    store = make()
    store.load("one", files["one"])
    record = store.store.acquire("one")
    store.start("one", files["one"])
    store.unload("one")
    assert isinstance(store.wait()[0], Conflict)
    store.store.release(record)
    assert not store.store.infos()


def test_names_that_are_no_text_and_thousands_of_problems_are_told_in_bounds(
    make: MakeStore, files: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(files["one"], folder)
    (folder / os.fsdecode(b"\xff.bin")).write_bytes(b"x")
    refused = make().load("odd", folder)
    assert isinstance(refused, Precondition) and refused.problems
    json.dumps(refused.problems).encode()
    "".join([refused.message, *refused.problems]).encode("utf-8")
    assert len(printable(["x"] * 10_000)) == 101


def test_unloading_what_is_not_there_is_not_found(make: MakeStore) -> None:
    store = make()
    store.unload("ghost")
    assert isinstance(store.wait()[0], NotFound)
