"""The life of weighted sums: made when they are named, one for the same parts, gone with their parts."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path

import pytest

from runtime.adapters import reader, sums
from runtime.adapters.compose import compose
from runtime.adapters.host_adapter import HostAdapter
from runtime.adapters.info import AdapterInfo, AdapterState, PartInfo
from runtime.adapters.record import AdapterRecord
from runtime.errors import AlreadyExists, Conflict, Exhausted, GraftError, InvalidRequest, NotFound, Precondition
from tests.adapters.conftest import MakeStore, StoreDriver

Files = dict[str, Path]


@pytest.fixture
def store(make: MakeStore, files: Files) -> StoreDriver:
    """Adapters `a` and `b` are loaded."""
    store = make()
    for name, file in (("a", "one"), ("b", "two")):
        store.load(name, files[file])
    return store


def _resident(store: StoreDriver, expression: str) -> AdapterRecord:
    record = store.store.acquire(expression)
    store.until(lambda: record.is_resident)
    return record


def _compose(store: StoreDriver, name: str, expression: str, **options: object) -> AdapterInfo:
    store.compose(name, expression, **options)
    (info,) = store.wait()
    assert isinstance(info, AdapterInfo), info
    return info


def _refusal(store: StoreDriver, name: str, expression: str, **options: object) -> GraftError:
    store.compose(name, expression, **options)
    (error,) = store.wait()
    assert isinstance(error, GraftError), error
    return error


def _names(store: StoreDriver) -> list[str]:
    return [info.name for info in store.store.infos()]


def test_the_same_sum_is_one_adapter_however_it_is_written(store: StoreDriver) -> None:
    assert isinstance(store.store.registry.set_alias("alias", "b").adapter, str)
    record = _resident(store, "0.7*a+0.3*b")
    assert record.label == "0.7*a@1+0.3*b@2"
    for same in ("0.3*b+0.7*a", "0.70*a@1+0.3*alias", "0.3*a+0.3*b+0.4*a", "b+0.7*a+-0.7*b"):
        assert store.store.acquire(same) is record
    assert store.store.acquire("0.7*a+0.31*b") is not record
    assert record.references == 5 and record.generation not in (1, 2)


def test_a_sum_of_one_adapter_with_weight_one_is_that_adapter(store: StoreDriver) -> None:
    assert store.store.acquire("0.5*a+0.5*a") is store.store.acquire("a") is store.store.acquire("1*a@1")
    assert store.store.acquire("0.5*a").label == "0.5*a@1"
    assert _names(store) == ["0.5*a@1", "a", "b"]


def test_a_sum_takes_what_its_parts_take_and_gives_it_back(store: StoreDriver) -> None:
    parts = sum(info.device_bytes for info in store.store.infos())
    record = _resident(store, "0.7*a+0.3*b")
    info = record.info()
    assert info.device_bytes == info.host_bytes == parts and store.store.pages.num_bytes == 2 * parts
    assert info.tensor_bytes == sum(store.store.info(name).tensor_bytes for name in "ab")
    assert info.parts == [PartInfo("a", 1, 0.7), PartInfo("b", 2, 0.3)] and info.derived
    assert store.store.info("0.3*b+0.7*a") == info
    store.store.release(record)
    for name in "ab":
        store.unload(name)
    assert all(isinstance(reply, AdapterInfo) for reply in store.wait(2))
    assert _names(store) == [] and store.store.pages.num_bytes == store.store.host_bytes == 0


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("a+nobody", "'nobody' is not loaded"),
        ("0.5*a@7+b", "'a' has no live generation 7: 1 is live"),
        ("a+-1*a+b", "the weights of adapter 'a' add up to 0"),
    ],
)
def test_a_sum_that_cannot_be_made_names_the_part(store: StoreDriver, expression: str, said: str) -> None:
    with pytest.raises((NotFound, InvalidRequest)) as caught:
        store.store.acquire(expression)
    assert said in caught.value.message
    assert _names(store) == ["a", "b"]
    with pytest.raises(NotFound):
        store.store.info("a+b")


def test_a_replaced_part_leaves_running_requests_the_old_sum(store: StoreDriver, files: Files) -> None:
    old = _resident(store, "a+b")
    store.load("a", files["three"], replace=True)
    assert old.state is AdapterState.DRAINING and old.is_resident
    new = _resident(store, "a+b")
    assert (old.label, new.label) == ("a@1+b@2", f"a@{store.store.info('a').generation}+b@2")
    store.store.release(old)
    assert old.state is AdapterState.UNLOADED and not old.is_resident
    store.store.release(new)
    assert new.is_resident and new.label in _names(store)


def test_an_unload_of_a_part_waits_for_the_requests_of_its_sums(store: StoreDriver) -> None:
    running, cached = _resident(store, "a+b"), _resident(store, "0.5*a+b")
    apart = _resident(store, "2*b")
    store.store.release(cached)
    own = store.store.info("a").device_bytes
    store.unload("a")
    assert not store.replies and cached.state is AdapterState.UNLOADED
    with pytest.raises(NotFound):
        store.store.acquire("a+b")
    store.unload("a")
    store.store.release(running)
    first, second = store.wait(2)
    assert isinstance(first, AdapterInfo) and isinstance(second, AdapterInfo)
    assert first.name == "a" and first.freed_device_bytes == own + 4 * own
    assert apart.is_resident and _names(store) == ["2*b@2", "b"]


def test_a_forced_unload_of_a_part_tells_which_requests_have_to_end(store: StoreDriver) -> None:
    running = _resident(store, "a+b")
    assert {record.label for record in store.force("a")} == {"a@1", "a@1+b@2"}
    store.store.release(running)
    store.wait()


def test_a_part_that_is_only_on_disk_is_read_for_the_sum_and_stands_for_its_bytes_then(
    store: StoreDriver, files: Files, tmp_path: Path
) -> None:
    folder = shutil.copytree(files["three"], tmp_path / "lazy")
    store.load("lazy", folder, lazy=True)
    record = _resident(store, "a+lazy")
    info = store.store.info("lazy")
    assert info.state == AdapterState.REGISTERED and info.digest.startswith("sha256:")
    shutil.rmtree(folder)
    shutil.copytree(files["four"], folder)
    held = store.store.acquire("2*lazy+b")
    store.until(lambda: held.error is not None)
    assert isinstance(held.error, Precondition) and held.error.reason == "ADAPTER_FILES_CHANGED"
    assert f"'lazy@{info.generation}'" in held.error.message
    assert [failed.label for failed, _ in store.store.take_failures()] == [held.label] and record.is_resident
    with pytest.raises(Precondition):
        store.store.acquire("2*lazy+b")


def test_a_part_that_is_loading_is_waited_for(store: StoreDriver, files: Files) -> None:
    store.start("c", files["three"])
    record = store.store.acquire("a+c")
    assert record.state is AdapterState.LOADING
    store.wait()
    store.until(lambda: record.is_resident)
    assert record.state is AdapterState.READY


def test_a_part_whose_first_load_fails_ends_the_requests_that_waited_for_the_sum(
    store: StoreDriver, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    store.start("c", tmp_path)
    record = store.store.acquire("a+c")
    assert isinstance(store.wait()[0], Precondition)
    failures = {failed.label: error.message for failed, error in store.store.take_failures()}
    assert "'c', which this request waited for" in failures[record.label]
    store.store.release(record)
    assert _names(store) == ["a", "b"]


def test_a_sum_that_nobody_waits_for_any_more_is_not_made(store: StoreDriver, files: Files) -> None:
    store.start("c", files["three"])
    store.store.release(store.store.acquire("a+c"))
    store.wait()
    store.store.advance(whole=True)
    assert _names(store) == ["a", "b", "c"]


def test_sums_leave_the_memory_like_adapters_and_are_made_anew(make: MakeStore, files: Files) -> None:
    store = make(max_adapters=1)
    for name, file in (("a", "one"), ("b", "two")):
        store.load(name, files[file])
    size = store.store.info("a").host_bytes
    store.store.memory.host.max_bytes = int(4.5 * size)
    store.use("a+b")
    first = store.store.info("a+b").generation
    store.use("0.5*a+b")
    assert _names(store) == ["0.5*a@1+b@2", "a", "b"]
    assert store.store.host_bytes <= 4.5 * size
    store.use("a+b")
    assert store.store.info("a+b").generation > first


def test_there_is_a_bound_on_sums_and_the_least_recently_used_one_makes_room(
    store: StoreDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "MAX_SUMS", 2)
    for expression in ("2*a", "3*a", "4*a"):
        store.use(expression)
    assert _names(store) == ["3*a@1", "4*a@1", "a", "b"]
    held = [store.store.acquire(expression) for expression in ("3*a", "4*a")]
    with pytest.raises(Exhausted) as caught:
        store.store.acquire("5*a")
    assert caught.value.reason == "ADAPTER_SUMS_FULL"
    store.store.release(held[0])
    assert store.store.acquire("5*a").label == "5*a@1"


def test_a_sum_that_could_never_be_on_the_device_is_refused_before_it_is_made(
    make: MakeStore, files: Files
) -> None:
    size = make().load("a", files["one"])
    assert isinstance(size, AdapterInfo)
    store = make(max_bytes=int(1.5 * size.device_bytes))
    for name, file in (("a", "one"), ("b", "two")):
        store.load(name, files[file])
    record = store.store.acquire("a+b")
    store.until(lambda: record.error is not None)
    assert isinstance(record.error, Exhausted) and record.error.reason == "ADAPTER_MEMORY_FULL"


def test_sums_are_made_off_the_loops_thread(store: StoreDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def noting(*args: object) -> HostAdapter:
        threads.append(threading.current_thread())
        return compose(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "compose", noting)
    _resident(store, "a+b")
    assert threads and threading.main_thread() not in threads


def test_a_sum_with_a_name_is_a_generation_that_stays_when_its_parts_go(store: StoreDriver, files: Files) -> None:
    info = _compose(store, "mix", "0.7*a+0.3*b", pinned=True)
    assert (info.state, info.pinned, info.derived) == (AdapterState.READY, True, False)
    assert info.parts == [PartInfo("a", 1, 0.7), PartInfo("b", 2, 0.3)] and info.digest.startswith("sha256:")
    store.load("a", files["three"], replace=True)
    store.unload("b")
    store.wait()
    assert store.store.info("mix") == info
    assert store.store.acquire("mix").generation == info.generation
    assert store.store.acquire("mix+a").label == f"a@{store.store.info('a').generation}+mix@{info.generation}"


def test_a_named_sum_that_left_the_memory_is_made_again_from_the_files_it_was_made_of(
    make: MakeStore, files: Files, tmp_path: Path
) -> None:
    folder = shutil.copytree(files["one"], tmp_path / "a")
    store = make(max_adapters=1)
    store.load("a", folder)
    store.load("b", files["two"])
    size = store.store.info("a").host_bytes
    before = _compose(store, "mix", "a+-0.5*b")
    for name in "ab":
        store.unload(name)
    store.wait(2)
    store.store.memory.host.max_bytes = int(2.5 * size)
    for name, file in (("c", "three"), ("d", "four")):
        store.load(name, files[file])
        store.use(name)
    assert store.store.info("mix").state == AdapterState.REGISTERED
    store.use("mix")
    now = store.store.info("mix")
    assert (now.generation, now.digest, now.device_bytes) == (before.generation, before.digest, 2 * size)
    store.use("c")
    store.use("d")
    shutil.rmtree(folder)
    shutil.copytree(files["five"], folder)
    record = store.store.acquire("mix")
    store.until(lambda: record.error is not None)
    assert record.error is not None and record.error.reason == "ADAPTER_FILES_CHANGED"
    assert "'a@1'" in record.error.message


def test_composing_is_loading_repeated_replaced_checked_and_refused_alike(store: StoreDriver, files: Files) -> None:
    first = _compose(store, "mix", "0.7*a+0.3*b", request_id="r")
    again = _compose(store, "mix", "0.3*b+0.7*a")
    assert again.already_loaded and again.generation == first.generation
    assert _compose(store, "mix", "0.7*a+0.3*b", request_id="r") == first
    assert isinstance(_refusal(store, "mix", "a+b"), AlreadyExists)
    checked = _compose(store, "mix", "a+b", replace=True, validate_only=True)
    assert (checked.generation, [part.weight for part in checked.parts]) == (0, [1.0, 1.0])
    replaced = _compose(store, "mix", "a+b", replace=True, expected_generation=first.generation)
    assert replaced.generation > first.generation
    missing = _refusal(store, "new", "a+nobody")
    assert isinstance(missing, NotFound) and "'nobody' is not loaded" in missing.message
    store.start("c", files["three"])
    busy = _refusal(store, "new", "a+c")
    assert isinstance(busy, Conflict) and busy.reason == "ADAPTER_BUSY"
    store.wait()
    assert "new" not in _names(store)


def test_a_sum_can_replace_one_of_its_own_parts(store: StoreDriver) -> None:
    info = _compose(store, "a", "0.5*a+0.5*b", replace=True)
    assert info.generation == 3 and [part.generation for part in info.parts] == [1, 2]
    assert store.store.acquire("a").generation == 3
    assert _names(store) == ["a", "b"]


def test_a_joined_rank_over_the_bound_is_refused_with_the_numbers(store: StoreDriver) -> None:
    """Each sum is that of the two before it: ranks 8, 8, 16, 24, 40, 64, 104, 168, 272, 440, 712."""
    names = "abcdefghijk"
    for place in range(2, 10):
        _compose(store, names[place], f"{names[place - 1]}+{names[place - 2]}")
    assert store.store.info("j").lora_rank_max == 440
    error = _refusal(store, "k", "j+i")
    assert isinstance(error, Precondition) and "joined rank is 712" in error.message and "512" in error.message


@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes_sums_get_the_generations_that_were_live_and_nothing_is_left(
    seed: int, make: MakeStore, files: Files
) -> None:
    """Requests for sums, loads, replacements and unloads at random, in too little memory of both kinds."""
    size = make().load("a", files["one"])
    assert isinstance(size, AdapterInfo)
    store = make(max_adapters=3, max_host_bytes=int(7.5 * size.device_bytes))
    draw = random.Random(seed)
    held: list[AdapterRecord] = []
    num_made = 0
    for _ in range(150):
        name, path = draw.choice("abc"), files[draw.choice(list(files))]
        match draw.randrange(7):
            case 0:
                store.start(name, path, replace=True, lazy=draw.random() < 0.3)
            case 1:
                store.unload(name, allow_missing=True)
            case 2 | 3 | 4:
                expression = "+".join(f"{draw.randint(1, 2)}*{part}" for part in draw.sample("abc", draw.randint(1, 3)))
                try:
                    held.append(store.store.acquire(expression))
                except GraftError as error:
                    assert isinstance(error, NotFound | Exhausted | Precondition)
                    continue
                live = {store.store.registry.get(part.record.name).generation for part in held[-1].parts}
                assert live == {part.record.generation for part in held[-1].parts}
                num_made += held[-1].derived
            case 5 if held:
                store.store.release(held.pop(draw.randrange(len(held))))
            case _:
                store.store.advance(whole=draw.random() < 0.5)
                store.woken.wait(0.002)
        for failed, _ in store.store.take_failures():
            for record in [record for record in held if record is failed and not record.is_resident]:
                held.remove(record)
                store.store.release(record)
    assert num_made > 10
    for record in held:
        store.store.release(record)
    for name in "abc":
        store.until(lambda name=name: not store.store._loads.is_changing(name))  # type: ignore[misc]
        store.unload(name, allow_missing=True)
    store.until(lambda: not store.store.infos() and not store.store.has_work)
    assert store.store.pages.num_bytes == store.store.host_bytes == 0
