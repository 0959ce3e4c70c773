"""Runs against a server of known speed: what is reported is what happened."""

from __future__ import annotations

import pytest

from runtime.bench.lengths import Uniform
from runtime.bench.plan import BenchPlan
from runtime.bench.record import RequestRecord
from runtime.bench.report import Report, build_report
from runtime.bench.run import BenchRun, run_bench
from runtime.errors import GraftError
from runtime.pb.fmaas import generation_pb2 as pb
from tests.bench.conftest import STEP_SECONDS
from tests.conftest import RecordNumber
from tests.server.live import LiveServer


async def bench(server: LiveServer, **plan: object) -> tuple[BenchRun, Report]:
    run = await run_bench(BenchPlan(server.address, **plan))
    return run, build_report(run, "graft bench")


async def test_a_closed_loop_reports_the_speed_and_the_tokens_that_the_server_has(
    paced: LiveServer, record_number: RecordNumber
) -> None:
    generated, steps = paced.metric("graft_generation_tokens_total"), 25
    run, report = await bench(
        paced,
        num_requests=24,
        concurrency=4,
        prompt_tokens=Uniform(10, 30),
        output_tokens=Uniform(steps, steps),
        metrics_address=paced.http_address,
    )
    overall = report["overall"]
    assert (overall["requests"], overall["failed"], overall["errors"]) == (24, 0, [])
    assert overall["output_tokens"] == 24 * steps
    assert paced.metric("graft_generation_tokens_total") - generated == (24 + 4) * steps
    assert all(10 <= record.prompt_tokens <= 30 for record in run.records)
    assert overall["itl_seconds"]["count"] == 24 * (steps - 1)
    itl, tpot = 1000 * overall["itl_seconds"]["p50"], 1000 * overall["tpot_seconds"]["mean"]
    record_number("bench: itl p50 of 10 ms steps, ms", itl, at_least=9.5, at_most=15)
    record_number("bench: tpot mean of 10 ms steps, ms", tpot, at_least=10, at_most=15)
    assert STEP_SECONDS <= overall["ttft_seconds"]["p50"] <= 5 * STEP_SECONDS
    share = overall["output_tokens_per_second"] / (4 / STEP_SECONDS)
    record_number("bench: throughput over that of 4 streams without pause", share, at_least=0.6, at_most=1)
    server_side = report["server_metrics"]
    assert (server_side["output_tokens"], server_side["e2e_seconds"]["count"]) == (24 * steps, 24)
    assert server_side["itl_seconds"]["mean"] == pytest.approx(overall["itl_seconds"]["mean"], rel=0.2)
    assert server_side["step_tokens"]["p99_at_most"] is not None


async def test_every_request_adds_up(paced: LiveServer) -> None:
    run, report = await bench(paced, num_requests=10, output_tokens=Uniform(5, 15), temperature=0.7)
    wanted = [row["output_tokens"] for row in report["requests"]]
    assert all(5 <= tokens <= 15 for tokens in wanted) and len(set(wanted)) > 1
    for record in run.records:
        assert record.ttft_seconds + sum(record.gaps_seconds) <= record.e2e_seconds
        assert record.arrived <= record.sent < record.times[0] <= record.times[-1] <= record.ended
    timeline = report["timeline"]
    total = sum(timeline["output_tokens_per_second"]) * timeline["bin_seconds"]
    assert total == pytest.approx(report["overall"]["output_tokens"], rel=1e-3)


async def test_errors_are_counted_by_code_and_spoil_nothing(paced: LiveServer) -> None:
    run, report = await bench(
        paced, num_requests=30, adapters=(("a", 1.0), ("nobody", 1.0), ("", 1.0)), output_tokens=Uniform(3, 3)
    )
    num_strangers = sum(record.adapter == "nobody" for record in run.records)
    assert 0 < num_strangers < 30
    overall, groups = report["overall"], {group["adapter"]: group for group in report["adapters"]}
    assert (overall["requests"], overall["failed"]) == (30 - num_strangers, num_strangers)
    (error,) = overall["errors"]
    assert (error["code"], error["reason"], error["count"]) == ("INVALID_ARGUMENT", "ADAPTER_NOT_FOUND", num_strangers)
    assert "nobody" in error["example"]
    assert list(groups) == ["", "a", "nobody"]
    assert groups["nobody"]["requests"] == 0 and groups["nobody"]["e2e_seconds"]["mean"] is None
    assert groups["a"]["failed"] == groups[""]["failed"] == 0
    tokens = [group["output_tokens"] for group in groups.values()]
    assert overall["output_tokens"] == 3 * (30 - num_strangers) == sum(tokens)
    assert [error["count"] for error in report["warmup"]["errors"]] == [1]


async def test_a_time_limit_ends_the_load_and_follows_what_runs_to_its_end(paced: LiveServer) -> None:
    run, report = await bench(paced, seconds=0.5, concurrency=3, output_tokens=Uniform(20, 20), num_warmup=0)
    assert report["window_seconds"] == 0.5
    assert report["warmup"] == {"requests": 0, "errors": []}
    assert all(record.arrived < run.start + 0.5 and record.output_tokens == 20 for record in run.records)
    last_end = max(record.ended for record in run.records) - run.start
    assert 0.5 < last_end < 3
    in_window = sum(when <= run.start + 0.5 for record in run.records for when in record.times)
    assert report["overall"]["output_tokens_per_second"] == pytest.approx(in_window / 0.5)


async def test_poisson_arrivals_are_sent_on_time(paced: LiveServer, record_number: RecordNumber) -> None:
    run, report = await bench(paced, num_requests=60, rate=80.0, concurrency=0, output_tokens=Uniform(2, 2), seed=5)
    offsets = [record.arrived - run.start for record in run.records]
    assert offsets == sorted(offsets)
    assert offsets[-1] == pytest.approx(60 / 80, rel=0.5)
    assert (report["plan"]["arrivals"], report["plan"]["timed_from"]) == ("poisson", "scheduled_arrival")
    late = 1000 * report["overall"]["queue_seconds"]["p50"]
    record_number("bench: sent after its scheduled arrival, p50, ms", late, at_least=0, at_most=5)


async def test_waiting_that_a_slow_server_causes_is_not_left_out(paced: LiveServer) -> None:
    """One place, 10 tokens of 10 ms: requests that are due much faster than that wait longer and longer."""
    run, report = await bench(
        paced, num_requests=12, rate=200.0, concurrency=1, output_tokens=Uniform(10, 10), num_warmup=1
    )
    service = [record.ended - record.sent for record in run.records]
    assert report["requests"][-1]["e2e_seconds"] == pytest.approx(sum(service), rel=0.2)
    queues = [row["queue_seconds"] for row in report["requests"]]
    assert queues == sorted(queues) and queues[-1] > max(0.8, 2 * max(service))
    for row in report["requests"]:
        assert row["ttft_seconds"] > row["queue_seconds"]


async def test_several_connections_share_the_load(paced: LiveServer) -> None:
    _, report = await bench(paced, num_requests=6, num_connections=3, output_tokens=Uniform(2, 2))
    assert (report["overall"]["requests"], report["plan"]["connections"]) == (6, 3)


async def test_a_deadline_is_an_error_of_its_own(paced: LiveServer) -> None:
    _, report = await bench(paced, num_requests=2, timeout_seconds=0.1, output_tokens=Uniform(100, 100), num_warmup=0)
    assert [(error["code"], error["count"]) for error in report["overall"]["errors"]] == [("DEADLINE_EXCEEDED", 2)]
    assert report["overall"]["itl_seconds"]["count"] == 0


async def test_a_plan_that_does_not_fit_the_server_is_refused_before_any_load(paced: LiveServer) -> None:
    before = paced.metric("graft_generation_tokens_total")
    with pytest.raises(ValueError, match="this server generates at most"):
        await run_bench(BenchPlan(paced.address, output_tokens=Uniform(5000, 5000)))
    with pytest.raises(GraftError, match="no server answers at"):
        await run_bench(BenchPlan("127.0.0.1:1"))
    with pytest.raises(GraftError, match="no metrics at"):
        await run_bench(BenchPlan(paced.address, num_warmup=0, metrics_address="127.0.0.1:1"))
    assert paced.metric("graft_generation_tokens_total") == before


def test_a_stream_without_a_stop_reason_has_failed() -> None:
    record = RequestRecord("", arrived=1.0, sent=1.0)
    record.take(pb.GenerationResponse(input_token_count=3), 1.5)
    record.take(pb.GenerationResponse(generated_token_count=2, text="ab"), 2.0)
    record.take(pb.GenerationResponse(generated_token_count=5, text="c"), 3.5)
    record.finish(4.0)
    assert record.error is not None and record.error.code == "INCOMPLETE"
    assert (record.ttft_seconds, record.gaps_seconds, record.tpot_seconds) == (1.0, [1.5], 0.5)
    assert (record.prompt_tokens, record.output_tokens, record.e2e_seconds) == (3, 5, 3.0)
