"""Files cut, changed, hidden or deleted at every kind of place: the load is refused by name, nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from benchmarks.marked_adapters import write_marked_adapter
from benchmarks.marked_model import write_base
from loaders.adapter_folder import folder_digest
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from tests.conftest import RecordNumber
from tests.server.live import LiveServer, eventually
from tests.server.marked_server import CONFIG, WEIGHTS, answers, contents, failure, listed, load, marked_server

MARK, OTHER_MARK = 7, 4000
NUM_RACES = 40


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("marked") / "base")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_marked_adapter(folder / "good", 0, MARK)
    write_marked_adapter(folder / "other", 0, OTHER_MARK)
    return folder


@pytest.fixture(scope="module")
def server(base: Path, root: Path) -> Iterator[LiveServer]:
    with marked_server(base, root, "--adapters-on-demand", limits=["no-override"]) as live:
        load(live, "good")
        yield live


@pytest.fixture
def suffering(root: Path) -> Iterator[Path]:
    """A good folder, for the worse; it is gone afterwards."""
    folder = root / "suffering"
    shutil.copytree(root / "good", folder)
    yield folder
    if folder.exists():
        folder.chmod(0o755)
        shutil.rmtree(folder)


def _refusal(server: LiveServer, **options: object) -> str:
    """What a load of the folder is told, once as a new name and once in the place of one that serves."""
    before = listed(server)
    told = set()
    for name in ("new", "good"):
        with pytest.raises(grpc.RpcError) as caught:
            load(server, name, "suffering", replace=True, **options)
        told.add(failure(caught.value).replace(f"'{name}'", "NAME"))
    assert listed(server) == before
    (line,) = told
    return line


def _places(weights: bytes) -> dict[str, int]:
    """Where a weights file can end too early, by what is cut there."""
    header_length = int.from_bytes(weights[:8], "little")
    places = {"empty": 0, "one byte": 1, "in the length": 7, "after the length": 8, "after one byte of the header": 9}
    places |= {"in the header": 8 + header_length // 2, "before the header's end": 7 + header_length}
    places["after the header"] = 8 + header_length
    for name, entry in json.loads(weights[8 : 8 + header_length]).items():
        if name != "__metadata__":
            begin, end = (8 + header_length + offset for offset in entry["data_offsets"])
            places |= {
                f"before {name}": begin,
                f"in {name}": (begin + end) // 2,
                f"in the last number of {name}": end - 1,
            }
    return places


def test_weights_cut_at_every_kind_of_place_are_refused_by_name(
    server: LiveServer, suffering: Path, record_number: RecordNumber
) -> None:
    whole = (suffering / WEIGHTS).read_bytes()
    places = _places(whole)
    for what, place in places.items():
        (suffering / WEIGHTS).write_bytes(whole[:place])
        told = _refusal(server)
        assert told.startswith("FAILED_PRECONDITION: adapter NAME is refused") and WEIGHTS in told, (what, told)
    assert answers(server, "good", MARK) and answers(server, None, None)
    record_number("files cut: places in the weights", len(places), at_least=100)


def test_a_configuration_cut_at_every_byte_is_refused_by_name(
    server: LiveServer, suffering: Path, record_number: RecordNumber
) -> None:
    whole = (suffering / CONFIG).read_bytes()
    for length in range(len(whole)):
        (suffering / CONFIG).write_bytes(whole[:length])
        told = _refusal(server)
        assert told.startswith("FAILED_PRECONDITION: adapter NAME is refused") and CONFIG in told, (length, told)
    assert answers(server, "good", MARK)
    record_number("files cut: places in the configuration", len(whole), at_least=200)


HIDE: dict[str, tuple[Callable[[Path], None], str]] = {
    "the folder": (lambda folder: folder.chmod(0), ""),
    "the folder's list": (lambda folder: folder.chmod(0o300), ""),
    "the folder's files": (lambda folder: folder.chmod(0o600), ""),
    "the weights": (lambda folder: (folder / WEIGHTS).chmod(0), WEIGHTS),
    "the configuration": (lambda folder: (folder / CONFIG).chmod(0), CONFIG),
}


@pytest.mark.parametrize("what", HIDE)
def test_what_may_not_be_read_is_refused_by_name(server: LiveServer, suffering: Path, what: str) -> None:
    hide, named = HIDE[what]
    hide(suffering)
    told = _refusal(server)
    assert told.startswith("FAILED_PRECONDITION") and "suffering" in told and named in told, told
    assert "ermission denied" in told
    with pytest.raises(grpc.RpcError) as caught:
        server.generate("x", "suffering")
    assert "ermission denied" in caught.value.details() and "suffering" in caught.value.details()
    assert answers(server, "good", MARK)
    server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="suffering", allow_missing=True))


@contextmanager
def _meanwhile(change: Callable[[int], None]) -> Iterator[None]:
    """`change` again and again in a thread."""
    done = threading.Event()

    def run() -> None:
        count = 0
        while not done.wait(0.0005):
            change(count)
            count += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _race(server: LiveServer, known: dict[str, int], digest: str = "") -> dict[str, int]:
    """Load while the folder changes; what was loaded answers with the mark of its digest. Counts of what happened."""
    happened: dict[str, int] = {}
    for _ in range(NUM_RACES):
        try:
            adapter = load(server, "racing", "suffering", replace=True, expected_digest=digest)
        except grpc.RpcError as error:
            told = failure(error)
            assert error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND), told
            assert "suffering" in told or WEIGHTS in told or "digest" in told, told
            happened["refused"] = happened.get("refused", 0) + 1
        else:
            assert answers(server, f"racing@{adapter.generation}", known[adapter.digest])
            happened[adapter.digest] = happened.get(adapter.digest, 0) + 1
    assert answers(server, "good", MARK)
    return happened


def test_a_file_renamed_over_while_it_is_read_is_loaded_as_one_or_the_other(
    server: LiveServer, root: Path, suffering: Path
) -> None:
    versions = [(root / name / WEIGHTS).read_bytes() for name in ("good", "other")]
    known = {folder_digest(root / "good"): MARK, folder_digest(root / "other"): OTHER_MARK}

    def rename_over(count: int) -> None:
        (suffering / "new").write_bytes(versions[count % 2])
        (suffering / "new").rename(suffering / WEIGHTS)

    with _meanwhile(rename_over):
        happened = _race(server, known)
    assert happened.keys() == known.keys()


def test_a_file_overwritten_in_place_while_it_is_read_is_what_its_digest_says_or_refused(
    server: LiveServer, root: Path, suffering: Path
) -> None:
    versions = [(root / name / WEIGHTS).read_bytes() for name in ("good", "other")]
    expected = folder_digest(root / "good")

    def overwrite(count: int) -> None:
        with (suffering / WEIGHTS).open("r+b") as file:
            file.write(versions[count % 2])

    with _meanwhile(overwrite):
        happened = _race(server, {expected: MARK}, expected)
    assert happened.get("refused", 0) > 0


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(
    server: LiveServer, suffering: Path, root: Path
) -> None:
    whole = (suffering / WEIGHTS).read_bytes()
    known = {folder_digest(root / "good"): MARK}

    def cut(count: int) -> None:
        if count % 2:
            (suffering / WEIGHTS).write_bytes(whole)
        else:
            os.truncate(suffering / WEIGHTS, len(whole) // 2)

    with _meanwhile(cut):
        happened = _race(server, known)
    assert happened.get("refused", 0) > 0


def test_a_folder_that_comes_and_goes_while_it_is_read_is_loaded_whole_or_refused(
    server: LiveServer, root: Path, suffering: Path
) -> None:
    known = {folder_digest(root / "good"): MARK}

    def come_and_go(_: int) -> None:
        shutil.rmtree(suffering)
        shutil.copytree(root / "good", suffering)

    with _meanwhile(come_and_go):
        happened = _race(server, known)
    assert happened.get("refused", 0) > 0


def test_an_adapter_whose_folder_is_gone_serves_on_and_one_that_is_only_registered_says_so(
    server: LiveServer, root: Path, suffering: Path
) -> None:
    load(server, "gone", "suffering")
    shutil.copytree(suffering, root / "registered")
    load(server, "registered", lazy=True)
    shutil.rmtree(suffering)
    shutil.rmtree(root / "registered")
    before = contents(root)
    assert answers(server, "gone", MARK)
    with pytest.raises(grpc.RpcError) as caught:
        answers(server, "registered", MARK)
    told = failure(caught.value)
    assert told.startswith("FAILED_PRECONDITION") and "registered" in told and "No such file" in told
    failed = next(item for item in listed(server) if item.name == "adapters/registered")
    assert "No such file" in failed.error_message and answers(server, "good", MARK) and contents(root) == before


def test_what_left_the_memory_and_is_another_on_disk_is_not_served_and_can_be_replaced(base: Path, root: Path) -> None:
    shutil.copytree(root / "good", root / "changed")
    small = ("--max-adapters", "1", "--adapter-memory-gib", "0.001", "--adapter-host-memory-gib", "0.00025")
    with marked_server(base, root, *small) as server:
        first = load(server, "changed")
        assert answers(server, "changed", MARK)
        load(server, "other")
        assert answers(server, "other", OTHER_MARK)
        shutil.copy(root / "other" / WEIGHTS, root / "changed" / WEIGHTS)
        with pytest.raises(grpc.RpcError) as caught:
            answers(server, "changed", MARK)
        assert f"'changed@{first.generation}'" in caught.value.details() and "replace" in caught.value.details()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert answers(server, "other", OTHER_MARK)
        second = load(server, "changed", replace=True)
        assert second.generation > first.generation and eventually(lambda: answers(server, "changed", OTHER_MARK))
    shutil.rmtree(root / "changed")
