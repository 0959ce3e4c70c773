"""`kill -9` of the engine or of the whole server while it reads an adapter, and a disk without a free byte."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.marked_adapters import write_marked_adapter
from benchmarks.marked_model import write_base
from runtime import cli
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from tests.server.live import LiveServer, eventually
from tests.server.marked_server import CONFIG, WEIGHTS, answers, contents, listed, load, marked_server

MARK, LARGE_MARK = 7, 4000
LARGE_RANK = 128
NUM_TRIES = 60
FULL_DISK_BYTES = 2**20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("marked") / "base")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two adapters; reading the large one takes a while, most of which its file is open."""
    folder = tmp_path / "adapters"
    write_marked_adapter(folder / "good", 0, MARK)
    large = write_marked_adapter(folder / "large", 0, LARGE_MARK)
    (large / CONFIG).write_text((large / CONFIG).read_text().replace('"r": 1', f'"r": {LARGE_RANK}')
                                .replace('"lora_alpha": 1', f'"lora_alpha": {LARGE_RANK}'))  # fmt: skip
    factors = load_file(large / WEIGHTS)
    save_file({name: _padded(name, factor) for name, factor in factors.items()}, large / WEIGHTS)
    return folder


def _padded(name: str, factor: torch.Tensor) -> torch.Tensor:
    """The same product with zeros in the other ranks."""
    side = 0 if "lora_A" in name else 1
    shape = list(factor.shape)
    shape[side] = LARGE_RANK - 1
    return torch.cat([factor, torch.zeros(shape)], dim=side)


def _family(pid: int) -> list[int]:
    """A process and all that came from it, those that have just ended left out."""
    family = [pid]
    for parent in family:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            family += [int(child) for child in _read(task).split()]
    return family


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _engine(server: LiveServer) -> int:
    return next(
        pid for pid in _family(server.process.pid) if "runtime.engine.process" in _read(Path(f"/proc/{pid}/cmdline"))
    )


def _is_alive(pid: int) -> bool:
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] not in ([], ["Z"])


def _reader_of(pids: list[int], file: Path) -> int | None:
    """Which of these processes has the file open."""
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                if os.readlink(descriptor) == str(file):
                    return pid
            except OSError:
                continue
    return None


@contextmanager
def _while_reading(server: LiveServer, file: Path) -> Iterator[list[grpc.RpcError]]:
    """Stop the server's processes in the middle of a load; gives what the load's caller is told afterwards."""
    told: list[grpc.RpcError] = []
    for _ in range(NUM_TRIES):
        family = _family(server.process.pid)
        caller = threading.Thread(target=_load_large, args=(server, told))
        caller.start()
        while (reader := _reader_of(family, file)) is None and caller.is_alive():
            pass
        if reader is not None:
            os.kill(reader, signal.SIGSTOP)
            if _reader_of([reader], file) is not None:
                yield told
                caller.join(30)
                return
            os.kill(reader, signal.SIGCONT)
        caller.join(30)
        server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="large", allow_missing=True), timeout=30)
    raise AssertionError(f"{file} was never found open")


def _go_on(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _load_large(server: LiveServer, told: list[grpc.RpcError]) -> None:
    try:
        load(server, "large")
    except grpc.RpcError as error:
        told.append(error)


@pytest.mark.parametrize("who", ["engine", "server"])
def test_a_kill_while_an_adapter_is_read_leaves_all_files_as_they_were_and_the_next_server_loads_it(
    base: Path, root: Path, tmp_path: Path, who: str
) -> None:
    before, temporary = contents(root), tmp_path / "temporary"
    temporary.mkdir()
    shared = set(Path("/dev/shm").iterdir())
    with marked_server(base, root, temporary=temporary) as server:
        load(server, "good")
        family, engine = _family(server.process.pid), _engine(server)
        with _while_reading(server, root / "large" / WEIGHTS) as told:
            killed = engine if who == "engine" else server.process.pid
            os.kill(killed, signal.SIGKILL)
            _go_on(set(family) - {killed})
        assert server.process.wait(20) == (1 if who == "engine" else -signal.SIGKILL)
        assert eventually(lambda: not any(_is_alive(pid) for pid in family), 20), "a process outlived the server"
        (error,) = told
        assert error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE), error
    assert contents(root) == before and contents(temporary) == {}
    assert set(Path("/dev/shm").iterdir()) <= shared
    with marked_server(base, root) as server:
        load(server, "good")
        load(server, "large")
        assert answers(server, "good", MARK) and answers(server, "large", LARGE_MARK) and answers(server, None, None)


def test_a_server_that_cannot_write_a_byte_does_everything(base: Path, root: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    limits = ["no-files"]
    with marked_server(base, root, "--adapters-on-demand", limits=limits, temporary=tmp_path) as server:
        assert answers(server, "large", LARGE_MARK)
        first = load(server, "x", "good", pinned=True)
        assert load(server, "x", "large", replace=True).generation > first.generation
        assert answers(server, "x", LARGE_MARK) and answers(server, None, None)
        server.adapters.SetAlias(pb.SetAliasRequest(alias="live", adapter_id="x"))
        assert answers(server, "live", LARGE_MARK)
        for name in ("x", "large"):
            server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name=name))
        assert listed(server) == [] and server.get("/readyz")[0] == 200
    assert contents(tmp_path) == before


@contextmanager
def _files_of_at_most(num_bytes: int) -> Iterator[None]:
    """As if the disk had no more room: writing further into any file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_converting_to_a_full_disk_leaves_nothing_there_and_what_was_there_as_it_was(
    base: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = root / "converted"
    command = ["convert", str(root / "large"), "--base", str(base), "--output", str(output)]
    before = contents(root)
    with _files_of_at_most(FULL_DISK_BYTES):
        assert cli.main(command) == 1
    told = capsys.readouterr().err
    assert f"{output}: cannot be written (File too large); nothing was left there" in told
    assert contents(root) == before
    assert cli.main(command) == 0
    whole = contents(root)
    with _files_of_at_most(FULL_DISK_BYTES):
        assert cli.main(command) == 1
    assert "the folder that was there is unchanged" in capsys.readouterr().err
    assert contents(root) == whole
    with marked_server(base, root) as server:
        load(server, "converted")
        assert answers(server, "converted", LARGE_MARK)
