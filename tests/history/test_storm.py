"""A storm of requests, loads, replacements, moves, unloads, cancels and deadlines leaves a history without a fault."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks import machine
from tests.conftest import RecordNumber
from tests.history.checker import check, counts
from tests.history.plan import Plan
from tests.history.records import History
from tests.history.storm import Left, run_storm, storm_server
from tests.server.live import REPOSITORY

SUMMARY = REPOSITORY / "benchmarks" / "results" / "history.json"
SMALL = Plan(seed=1, num_requests=1500)
WHOLE = Plan(seed=2, num_requests=33_000, num_clients=48)
MAX_TOLD = 10

# What must have happened, or the storm says little.
HAPPENED = ("load OK", "load ADAPTER_REFUSED", "load GENERATION_MISMATCH", "unload OK", "unload ADAPTER_DRAINING",
            "alias OK", "unalias OK", "request OK", "request CANCELLED", "request DEADLINE_EXCEEDED",
            "request ADAPTER_NOT_FOUND", "request ADAPTER_UNLOADED", "requests read with a pause")  # fmt: skip


def _storm(folder: Path, plan: Plan) -> tuple[History, Left, dict[str, float]]:
    """The history, what was left, and what the server's metrics say at the end."""
    with storm_server(folder) as server:
        history, left = asyncio.run(run_storm(server, folder / "adapters", plan))
        gauges = {
            "running": server.metric("graft_requests_running") + server.metric("graft_requests_waiting"),
            "evictions": server.metric("graft_adapter_evictions_total"),
            "loads": server.metric("graft_adapter_loads_total"),
        }
    return history, left, gauges


def _assert_no_fault(
    told: tuple[History, Left, dict[str, float]], record_number: RecordNumber, min_requests: int, min_replacements: int
) -> dict[str, object]:
    history, left, gauges = told
    violations = [str(violation) for violation in check(history)]
    happened = counts(history)
    longest = max(request.begun_by - request.sent for request in history.requests)
    for name, number in happened.items():
        print(f"{name:<40} {number}")
    assert not violations, "\n".join([f"{len(violations)} violations", *violations[:MAX_TOLD]])
    assert (left.adapters, left.slots, left.device_bytes, left.host_bytes) == ([], 0, 0, 0)
    assert gauges["running"] == 0
    for what in HAPPENED:
        assert happened.get(what), what
    record_number("history: requests with tokens", happened["requests with tokens"], at_least=min_requests)
    record_number("history: replacements", happened["replacements"], at_least=min_replacements)
    record_number("history: evictions", gauges["evictions"], at_least=min_replacements)
    record_number("history: longest wait for a first token, s", longest, at_most=history.max_wait_seconds)
    return {"violations": 0, "longest_wait_seconds": longest, **happened, **gauges}


def test_a_small_storm_leaves_a_history_without_a_fault(tmp_path: Path, record_number: RecordNumber) -> None:
    _assert_no_fault(_storm(tmp_path, SMALL), record_number, min_requests=800, min_replacements=20)


@pytest.mark.history
@pytest.mark.timeout(1800)
def test_the_whole_storm_leaves_a_history_without_a_fault(tmp_path: Path, record_number: RecordNumber) -> None:
    told = _storm(tmp_path, WHOLE)
    summary = _assert_no_fault(told, record_number, min_requests=20_000, min_replacements=200)
    about = {"seed": WHOLE.seed, "clients": WHOLE.num_clients, "operators": WHOLE.num_operators} | machine.describe()
    SUMMARY.write_text(json.dumps(about | summary, indent=1) + "\n", encoding="utf-8")
