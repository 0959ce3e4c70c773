"""Steps leave the cores to the reading of adapters for a while, where both need them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from runtime.adapters.folder_reader import ReadAdapter
from runtime.adapters.host_adapter import HostAdapter
from runtime.adapters.reader import MAX_LENT_SECONDS, AdapterReader, SumLimits
from runtime.adapters.record import AdapterFacts, Source
from runtime.env import engine_environment
from runtime.ops.cpu import CpuOps
from runtime.ops.cuda.ops import CudaOps

SHARE = 0.25


class Folders:
    """Reads when it is told to."""

    def __init__(self) -> None:
        self.may_read = threading.Semaphore(0)

    def start(self) -> None:
        pass

    def read(self, name: str, path: str, digest: str) -> ReadAdapter:
        self.may_read.acquire(timeout=60)
        return ReadAdapter("sha256:0", HostAdapter({}, {}), AdapterFacts(), 0.0)

    def interrupt(self) -> None:
        self.may_read.release(10)

    def close(self) -> None:
        pass


@pytest.fixture
def folders() -> Folders:
    return Folders()


@pytest.fixture
def reader(folders: Folders) -> Iterator[AdapterReader]:
    reading = AdapterReader(folders, SumLimits(8, 8), lambda: None, SHARE)
    yield reading
    reading.close()


def _lent_seconds(reader: AdapterReader, step_seconds: float) -> float:
    begun = time.monotonic()
    reader.lend_cores(step_seconds)
    return time.monotonic() - begun


def _start(reader: AdapterReader) -> list[object]:
    told: list[object] = []
    reader.read("a", Source("a", "folder", "", AdapterFacts(), None, ()), told.append)
    return told


def test_nothing_is_lent_while_nothing_is_read(reader: AdapterReader, folders: Folders) -> None:
    assert _lent_seconds(reader, 1000.0) < 1
    told = _start(reader)
    folders.may_read.release()
    while not reader.has_news:
        time.sleep(0.01)
    reader.deliver()
    assert len(told) == 1 and _lent_seconds(reader, 1000.0) < 1


def test_a_share_of_the_step_before_is_lent_while_a_folder_is_read(reader: AdapterReader) -> None:
    _start(reader)
    assert 0.01 <= _lent_seconds(reader, 0.01 / SHARE) < 1
    assert _lent_seconds(reader, 0.0) < 1


def test_the_cores_come_back_as_soon_as_something_has_been_read(
    reader: AdapterReader, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.adapters.reader.MAX_LENT_SECONDS", 60.0)
    _start(reader)
    threading.Timer(0.1, folders.may_read.release).start()
    assert _lent_seconds(reader, 1000.0) < 10


def test_a_long_step_lends_them_for_a_short_time(reader: AdapterReader) -> None:
    _start(reader)
    assert MAX_LENT_SECONDS <= _lent_seconds(reader, 1000.0) < 1


def test_a_second_folder_is_waited_for_when_the_first_has_been_read(reader: AdapterReader, folders: Folders) -> None:
    _start(reader)
    _start(reader)
    folders.may_read.release()
    while not reader.has_news:
        time.sleep(0.01)
    assert _lent_seconds(reader, 1000.0) < 10
    reader.deliver()
    assert _lent_seconds(reader, 0.01 / SHARE) >= 0.01


def test_only_steps_that_compute_on_the_cores_lend_them() -> None:
    assert 0 < CpuOps.core_share < 0.25 and CudaOps.core_share == 0


def test_the_threads_of_steps_spin_for_a_short_time_unless_the_user_has_a_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert engine_environment()["GOMP_SPINCOUNT"] == "60000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert "GOMP_SPINCOUNT" not in engine_environment()
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert engine_environment()["GOMP_SPINCOUNT"] == "5"
