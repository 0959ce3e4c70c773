"""A server whose process that reads adapters is killed: one load is lost, and nothing else."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from tests.server.live import REPOSITORY, LiveServer, eventually

ROOT = REPOSITORY / "runtime" / "demo" / "adapters"
FIRST, SECOND = "date-iso", "chinese-numerals"


def _load(server: LiveServer, name: str, path: str, **options: object) -> pb.Adapter:
    request = pb.LoadAdapterRequest(adapter_id=name, source_path=path, **options)
    return server.adapters.LoadAdapter(request, timeout=60).adapter


def test_a_load_whose_process_is_killed_is_unavailable_and_the_next_one_works_and_no_process_is_left() -> None:
    with LiveServer.demo(ROOT) as server:
        reader = _kill_during_a_load(server)
    assert eventually(lambda: not Path(f"/proc/{reader}").exists(), 20)


def _kill_during_a_load(server: LiveServer) -> int:
    """Returns the process that reads in the end."""
    _load(server, "a", FIRST)
    reader = _reading_process(server.process.pid)
    os.kill(reader, signal.SIGSTOP)
    failed: list[grpc.RpcError] = []

    def replace() -> None:
        try:
            _load(server, "a", SECOND, replace=True)
        except grpc.RpcError as error:
            failed.append(error)

    loading = threading.Thread(target=replace)
    loading.start()
    assert eventually(lambda: server.metric("graft_requests_running") == 0 and _is_loading(server), 20)
    before = server.generate("date: 3 May 2024 ->", "a").text  # nobody waits for a load that does not come
    os.kill(reader, signal.SIGKILL)
    loading.join(60)
    (error,) = failed
    details = rpc_status.from_call(error).details
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert any(detail.Unpack(info) for detail in details) and info.reason == "ADAPTER_READER_LOST"
    assert any(detail.Unpack(retry) for detail in details) and retry.retry_delay.ToMilliseconds() > 0
    assert server.generate("date: 3 May 2024 ->", "a").text == before
    replaced = _load(server, "a", SECOND, replace=True)
    new_reader = _reading_process(server.process.pid)
    assert (replaced.state, new_reader == reader) == (pb.Adapter.STATE_READY, False)
    return new_reader


def _is_loading(server: LiveServer) -> bool:
    listed = server.adapters.ListAdapters(pb.ListAdaptersRequest(), timeout=20).adapters
    return any(adapter.state == pb.Adapter.STATE_LOADING for adapter in listed)


def _reading_process(server: int) -> int:
    """The reading process among what a process has started, and what that has started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal():
                fields = (entry / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
                parents[int(entry.name)] = (int(fields[1]), (entry / "cmdline").read_bytes())
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    family = {server}
    for _ in range(3):
        family |= {pid for pid, (parent, _) in parents.items() if parent in family}
    (reader,) = (pid for pid in family if b"runtime.adapters.reading_worker" in parents[pid][1])
    return reader
