"""More adapters than the device and host memory hold: every answer right, no wait beyond the bound, memory flat."""

from __future__ import annotations

from pathlib import Path

from benchmarks.many_adapters import MAX_WAIT_SECONDS, as_text, growth, measure
from benchmarks.many_adapters_traffic import Traffic
from tests.conftest import RecordNumber

MIB = 2**20
TRAFFIC = Traffic(num_adapters=100, rate_per_second=25.0, warm_up_seconds=2.0, seconds=6.0)


def test_a_hundred_adapters_share_four_places(tmp_path: Path, record_number: RecordNumber) -> None:
    report = measure(tmp_path, TRAFFIC, num_slots=4)
    assert (report["wrong"], report["errors"], report["right"]) == ([], {}, report["requests"])
    record_number("100 adapters, 4 places: requests", report["requests"], at_least=80)
    longest = report["wait_seconds"]["p100"]
    record_number("100 adapters, 4 places: longest wait, s", longest, at_most=MAX_WAIT_SECONDS)
    for name in (
        "evictions from the device",
        "evictions from host memory",
        "loads to the device",
        "hits on the device",
    ):
        record_number(f"100 adapters, 4 places: {name}", report["counts"][name], at_least=5)
    assert {"runtime.cli", "runtime.engine.process"} <= report["memory"].keys()
    assert all(seen["flat"] for seen in report["memory"].values()), report["memory"]
    assert "4 places on the device, host memory for 10" in as_text(report)


def test_growing_memory_is_not_flat() -> None:
    flat, leaking = (
        [{"a": 2000 * MIB + step} for step in range(100)],
        [{"a": (500 + step) * MIB} for step in range(100)],
    )
    assert growth(flat)["a"]["flat"] and not growth(leaking)["a"]["flat"]
    assert growth([{"a": 2000 * MIB}, {"a": 2030 * MIB}])["a"]["flat"]
