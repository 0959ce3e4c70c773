"""A reader that stops reading: its request is paused and then ended, and nobody else notices."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import grpc
import pytest

from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.fmaas.generation_pb2_grpc import GenerationServiceStub
from tests.conftest import RecordNumber
from tests.server.live import LiveServer, refused
from tests.server.test_lifecycle import eventually

STEP_SECONDS = 0.005
SLOW_READER_SECONDS = 4.0
NUM_OTHERS = 16
NUM_ROUNDS = 3
ROUND_TOKENS = 300
# A client whose HTTP/2 window stays small, so that what it does not read stays with the server.
SMALL_WINDOW = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16_384),
    ("grpc.use_local_subchannel_pool", 1),
]
LONG = {"max_new_tokens": 100_000, "min_new_tokens": 100_000}
RICH = {"generated_tokens": True, "token_logprobs": True, "token_ranks": True, "top_n_tokens": 10}


@pytest.fixture(scope="module")
def server(adapters_root: Path) -> Iterator[LiveServer]:
    settings = ("max_new_tokens_limit=100000", f"slow_reader_seconds={SLOW_READER_SECONDS}", "max_model_len=120000")
    with LiveServer.fake(adapters_root, *settings, step_seconds=STEP_SECONDS) as live:
        yield live


def _stalled(server: LiveServer, channel: grpc.Channel) -> grpc.Call:
    """A stream with long messages whose reader takes one of them and no more."""
    params = pb.Parameters(stopping=pb.StoppingCriteria(**LONG), response=pb.ResponseOptions(**RICH))
    request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text="a long story"), params=params)
    call = GenerationServiceStub(channel).GenerateStream(request)
    next(call)
    return call


def _median_gap_ms(server: LiveServer) -> float:
    """Inter-token latency of other streams that are read as fast as they come."""
    gaps: list[float] = []

    def read() -> None:
        stopping = {"max_new_tokens": ROUND_TOKENS, "min_new_tokens": ROUND_TOKENS}
        arrivals = [time.perf_counter() for part in server.stream("other", stopping=stopping) if part.text]
        gaps.extend(later - sooner for sooner, later in pairwise(arrivals[20:]))

    readers = [threading.Thread(target=read) for _ in range(NUM_OTHERS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(gaps) > NUM_OTHERS * (ROUND_TOKENS - 50)
    return 1e3 * statistics.median(gaps)


def test_a_stalled_reader_is_paused_and_then_ended_with_everything_freed(server: LiveServer) -> None:
    with grpc.insecure_channel(server.address, SMALL_WINDOW) as channel:
        call = _stalled(server, channel)
        assert eventually(lambda: server.metric("graft_requests_paused") == 1, 10.0)
        made = server.metric("graft_generation_tokens_total")
        time.sleep(0.5)
        assert server.metric("graft_generation_tokens_total") == made
        assert eventually(lambda: server.metric("graft_requests_running") == 0, 2 * SLOW_READER_SECONDS)
        assert refused(lambda: list(call))[:2] == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER")
    assert server.generate("abc").text == "abc"


def test_a_reader_that_goes_on_in_time_gets_every_token(server: LiveServer) -> None:
    params = pb.Parameters(
        stopping=pb.StoppingCriteria(max_new_tokens=1500, min_new_tokens=1500), response=pb.ResponseOptions(**RICH)
    )
    request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text="a long story"), params=params)
    with grpc.insecure_channel(server.address, SMALL_WINDOW) as channel:
        call = GenerationServiceStub(channel).GenerateStream(request)
        parts = [next(call)]
        assert eventually(lambda: server.metric("graft_requests_paused") == 1, 10.0)
        time.sleep(SLOW_READER_SECONDS / 4)
        parts.extend(call)
    assert sum(len(part.tokens) for part in parts) == parts[-1].generated_token_count == 1500


def test_others_do_not_notice_a_stalled_reader(server: LiveServer, record_number: RecordNumber) -> None:
    alone, beside = [], []
    for _ in range(NUM_ROUNDS):
        alone.append(_median_gap_ms(server))
        with grpc.insecure_channel(server.address, SMALL_WINDOW) as channel:
            call = _stalled(server, channel)
            beside.append(_median_gap_ms(server))
            call.cancel()
        assert eventually(lambda: server.metric("graft_requests_running") == 0)
    record_number("16 streams: median ms between tokens", min(alone))
    record_number("the same beside a stalled reader / without", min(beside) / min(alone), at_most=1.10)
