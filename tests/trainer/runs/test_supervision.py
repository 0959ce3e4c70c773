"""`graft train` with several processes ends all of them, and says which one was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import threading

import pytest

from runtime.commands import train


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"])


def shell(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", script])


@pytest.fixture(autouse=True)
def _little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(train, "POLL_SECONDS", 0.02)


def test_a_killed_process_is_named_and_those_that_wait_for_it_are_ended(capfd: pytest.CaptureFixture[str]) -> None:
    processes = [sleeper(), shell("kill -9 $$"), shell("sleep 0.1; exit 1")]
    assert train._supervise(processes) == 1
    expected = "graft train: process 1 was ended by signal 9 (Killed); --resume goes on from the newest checkpoint\n"
    assert capfd.readouterr().err == expected
    assert all(process.poll() is not None for process in processes)


def test_a_process_that_told_what_it_met_is_not_told_of_again(capfd: pytest.CaptureFixture[str]) -> None:
    processes = [shell("echo 'graft train: no room' >&2; exit 1"), sleeper()]
    assert train._supervise(processes) == 1
    assert capfd.readouterr().err == "graft train: no room\n"
    assert processes[1].returncode == -signal.SIGKILL


def test_processes_that_end_well_end_the_run_well() -> None:
    assert train._supervise([shell("sleep 0.2"), shell("exit 0")]) == 0


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_all_processes(number: int, ending: type[BaseException]) -> None:
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, it is ignored
    processes = [sleeper(), sleeper()]
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    try:
        with pytest.raises(ending) as caught:
            train._supervise(processes)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert all(process.poll() is not None for process in processes)
    assert signal.getsignal(signal.SIGTERM) is before
    if number == signal.SIGTERM:
        assert caught.value.code == 128 + signal.SIGTERM
