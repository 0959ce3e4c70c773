"""Taking a server out of traffic, by SIGTERM and by an operator. A step of the fake engine takes 10 ms here."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2

from runtime.demo import ADAPTERS_DIR, TASKS_DIR
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.graft.admin.v1 import adapters_pb2 as adapters_pb
from runtime.pb.graft.admin.v1 import server_pb2 as admin_pb
from tests.conftest import RecordNumber
from tests.server.live import LiveServer, eventually, health, refused

STARTED, IN_PROGRESS, COMPLETE = (
    admin_pb.DrainResponse.PHASE_STARTED,
    admin_pb.DrainResponse.PHASE_IN_PROGRESS,
    admin_pb.DrainResponse.PHASE_COMPLETE,
)
LONG = {"max_new_tokens": 200, "min_new_tokens": 200}  # two seconds
DRAINING = (grpc.StatusCode.UNAVAILABLE, "DRAINING")
NUM_CLIENTS = 32


@pytest.fixture
def doomed(adapters_root: Path) -> Iterator[LiveServer]:
    with LiveServer.fake(adapters_root, step_seconds=0.01) as live:
        yield live


def drain(live: LiveServer, **timeout: int) -> grpc.Call:
    """A Drain call; without `timeout` it waits for as long as the server's own."""
    request = admin_pb.DrainRequest(timeout=duration_pb2.Duration(**timeout) if timeout else None)
    return live.admin.Drain(request, timeout=20)


def told(call: grpc.Call) -> list[tuple[int, int]]:
    return [(response.phase, response.running_request_count) for response in call]


def test_an_operator_watches_the_running_requests_end_and_the_server_stays_up(doomed: LiveServer) -> None:
    calls = [doomed.stream("abc", stopping={**LONG, "max_new_tokens": n, "min_new_tokens": n}) for n in (50, 200, 200)]
    received = [[next(call)] for call in calls]
    messages = drain(doomed)
    assert next(messages) == admin_pb.DrainResponse(phase=STARTED, running_request_count=3)
    assert refused(lambda: doomed.generate("abc"))[:2] == DRAINING
    load = adapters_pb.LoadAdapterRequest(adapter_id="a", source_path="dates")
    assert refused(lambda: doomed.adapters.LoadAdapter(load))[:2] == DRAINING
    assert doomed.get("/readyz") == (503, "draining\n")
    assert doomed.get("/healthz")[0] == 200
    assert health(doomed.admin_channel, "graft.admin.v1.ServerService") == health(doomed.channel, "")
    rest = told(messages)
    for parts, call in zip(received, calls, strict=True):
        parts.extend(call)
    assert [parts[-1].stop_reason for parts in received] == [pb.MAX_TOKENS] * 3
    counts = [count for phase, count in rest[:-1] if phase == IN_PROGRESS]
    assert len(counts) == len(rest) - 1
    assert counts == sorted(counts, reverse=True) and 2 in counts
    assert counts.count(2) >= 2, "one message at the change, and one a second later"
    assert rest[-1] == (COMPLETE, 0)
    assert doomed.admin.GetServerInfo(admin_pb.GetServerInfoRequest()).state == (
        admin_pb.GetServerInfoResponse.STATE_DRAINING
    )
    assert doomed.admin.GetLoad(admin_pb.GetLoadRequest()).draining
    doomed.process.send_signal(signal.SIGTERM)
    assert doomed.process.wait(5) == 0


def test_a_second_drain_joins_the_first_and_a_caller_that_goes_away_ends_neither(doomed: LiveServer) -> None:
    call = doomed.stream("abc", stopping=LONG)
    next(call)
    first = drain(doomed)
    assert next(first).phase == STARTED
    second = drain(doomed)
    assert next(second) == admin_pb.DrainResponse(phase=IN_PROGRESS, running_request_count=1)
    first.cancel()
    assert told(second)[-1] == (COMPLETE, 0)
    assert list(call)[-1].generated_token_count == 200
    assert told(drain(doomed)) == [(IN_PROGRESS, 0), (COMPLETE, 0)]


def test_a_drain_that_runs_out_of_time_says_so_and_ends_no_request(doomed: LiveServer) -> None:
    call = doomed.stream("abc", stopping=LONG)
    next(call)
    for timeout in ({"nanos": 200_000_000}, {"seconds": 0}):
        code, reason, _ = refused(lambda timeout=timeout: list(drain(doomed, **timeout)))
        assert (code, reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DRAIN_TIMEOUT")
    assert refused(lambda: doomed.generate("abc"))[:2] == DRAINING
    assert list(call)[-1].generated_token_count == 200


@pytest.mark.parametrize("timeout", [{"seconds": -1}, {"seconds": 86_401}, {"seconds": 2**60}])
def test_a_timeout_that_cannot_be_begins_no_drain(server: LiveServer, timeout: dict) -> None:
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER", "timeout")
    assert refused(lambda: list(drain(server, **timeout))) == expected
    assert server.generate("abc").text == "abc"


def test_after_sigterm_an_idle_server_goes_on_answering_for_the_drain_delay(adapters_root: Path) -> None:
    with LiveServer.fake(adapters_root, "drain_delay_seconds=1.0") as live:
        began = time.monotonic()
        live.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: refused(lambda: live.generate("abc"))[:2] == DRAINING)
        while time.monotonic() - began < 0.8:
            assert refused(lambda: live.generate("abc"))[:2] == DRAINING
            assert live.get("/readyz") == (503, "draining\n")
            time.sleep(0.1)
        assert live.process.wait(5) == 0
        assert 1.0 <= time.monotonic() - began < 3.0


def test_a_second_sigterm_skips_the_drain_delay(adapters_root: Path) -> None:
    with LiveServer.fake(adapters_root, "drain_delay_seconds=60.0") as live:
        live.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: live.metric("graft_draining") == 1)
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(5) == 0


def test_the_drain_timeout_ends_what_still_runs_as_unavailable_and_the_log_counts(adapters_root: Path) -> None:
    with LiveServer.fake(adapters_root, "drain_timeout_seconds=1.3", step_seconds=0.02) as live:
        stuck, short = live.stream("abc", stopping=LONG), live.stream("abc", stopping={"max_new_tokens": 40})
        next(stuck), next(short)
        live.process.send_signal(signal.SIGTERM)
        assert list(short)[-1].stop_reason == pb.EOS_TOKEN
        assert refused(lambda: list(stuck))[:2] == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPED")
        assert live.process.wait(8) == 0
        log = "".join(live.errors)
    assert "draining, calls running: 2" in log and "draining, calls running: 1" in log
    assert "ending calls that did not finish in time: 1" in log


@dataclass
class Client:
    """Asks one question after another until the server refuses, and never again."""

    live: LiveServer
    prompts: list[str]
    texts: list[tuple[str, str]] = field(default_factory=list)
    num_lost: int = 0
    refusal: str = ""

    def run(self, as_stream: bool) -> None:
        """Every text is kept; a call that fails in any way but a refusal at the door is a lost one."""
        for prompt in self.prompts:
            parts: list[str] = []
            try:
                if as_stream:
                    for response in self.live.stream(prompt, "date-iso", stopping={"max_new_tokens": 40}):
                        parts.append(response.text)
                else:
                    parts.append(self.live.generate(prompt, "date-iso", stopping={"max_new_tokens": 40}).text)
            except grpc.RpcError as error:
                self.num_lost += bool(parts) or error.code() is not grpc.StatusCode.UNAVAILABLE
                self.refusal = error.details()
                return
            self.texts.append((prompt, "".join(parts)))


def test_a_drain_under_load_loses_no_text(record_number: RecordNumber) -> None:
    """The real engine, 32 clients, half of them streaming: what was let in ends with its full text."""
    rows = [json.loads(line) for line in (TASKS_DIR / "date-iso.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [row["prompt"] for row in rows][:NUM_CLIENTS]
    with LiveServer.demo(ADAPTERS_DIR, "--adapter", f"date-iso={ADAPTERS_DIR / 'date-iso'}") as live:
        alone = {p: live.generate(p, "date-iso", stopping={"max_new_tokens": 40}).text for p in prompts}
        clients = [Client(live, (prompts[n:] + prompts[:n]) * 100) for n in range(NUM_CLIENTS)]
        threads = [threading.Thread(target=c.run, args=(n % 2 == 0,)) for n, c in enumerate(clients)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: sum(len(client.texts) for client in clients) >= NUM_CLIENTS, 30)
        num_inside = live.admin.GetLoad(admin_pb.GetLoadRequest()).request_count
        live.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert live.process.wait(20) == 0
    assert all(client.refusal for client in clients)
    texts = [text for client in clients for text in client.texts]
    lost = sum(client.num_lost for client in clients) + sum(alone[prompt] != text for prompt, text in texts)
    record_number("drain under load: requests running at SIGTERM", num_inside, at_least=NUM_CLIENTS / 2)
    record_number("drain under load: texts received", len(texts), at_least=NUM_CLIENTS)
    record_number("drain under load: texts lost", lost, at_most=0)


def test_a_rolling_restart_fails_no_request_of_clients_that_go_elsewhere(
    adapters_root: Path, record_number: RecordNumber
) -> None:
    """Two servers, 16 clients; each server is drained and stopped in turn while a new one takes its place."""
    stop = threading.Event()
    settings, times = ("drain_delay_seconds=0.5",), {"step_seconds": 0.002}
    starting = [LiveServer.fake(adapters_root, *settings, **times) for _ in range(3)]
    with starting[0] as first, starting[1] as second, starting[2] as third:
        servers = [first, second]

        def ask(number: int) -> tuple[int, int]:
            """How many questions were answered right, and how many wrong or not at all."""
            num_right = num_failed = 0
            text = f"text {number}"
            while not stop.is_set():
                answer = ""
                for attempt in range(4):
                    live = servers[(number + attempt) % len(servers)]
                    try:
                        answer = live.generate(text, stopping={"max_new_tokens": 40}).text
                        break
                    except grpc.RpcError as error:
                        assert error.code() is grpc.StatusCode.UNAVAILABLE, error
                num_right += answer == text
                num_failed += answer != text
            return num_right, num_failed

        with ThreadPoolExecutor(16) as clients:
            asking = [clients.submit(ask, number) for number in range(16)]
            try:
                for index, (old, new) in enumerate(((first, third), (second, third))):
                    time.sleep(0.3)
                    assert told(drain(old))[-1] == (COMPLETE, 0)
                    servers[index] = new
                    old.process.send_signal(signal.SIGTERM)
                    assert old.process.wait(10) == 0
            finally:
                stop.set()
            counts = [future.result(20) for future in asking]
    record_number("rolling restart: requests answered", sum(right for right, _ in counts), at_least=100)
    record_number("rolling restart: requests failed", sum(failed for _, failed in counts), at_most=0)
