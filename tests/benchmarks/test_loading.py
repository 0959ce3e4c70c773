"""What the loading benchmarks compute of their samples, and that a real server stands behind them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cold_adapter, steps_while_loading
from benchmarks.cold_adapter import Sample
from benchmarks.make_model import adapter_dir
from benchmarks.served import models_dir, read_steps, serving
from benchmarks.steps_while_loading import Operation, Segment, distribution


def test_percentiles_are_values_that_were_seen() -> None:
    about = distribution([index / 1000 for index in range(1, 101)])
    assert (about["median_ms"], about["p99_ms"], about["max_ms"]) == pytest.approx((50.5, 99, 100))


def test_ratios_compare_segments_with_and_without_operations_at_both_ends() -> None:
    quiet = Segment(False, 0.0, 10.0, gaps=[(moment, 0.1) for moment in range(10)])
    busy = Segment(True, 20.0, 30.0, gaps=[(20.0 + moment, 0.2) for moment in range(10)])
    busy.operations.append(Operation("load", 21.0, 22.0))
    steps = [(float(moment), 0.5, 0.0, 16) for moment in range(11)]
    steps += [(20.0 + 3 * moment, 0.5, 0.03, 16) for moment in range(4)]
    report = steps_while_loading.summarise([quiet, busy], steps)
    assert report["client"]["median_ratio"] == pytest.approx(2.0)
    assert report["engine"]["p99_ratio"] == pytest.approx(3.0)
    assert (report["operations"]["load"]["count"], report["operations"]["unload"]["count"]) == (1, 0)
    assert report["operations"]["load"]["worst_adapter_ms_median"] == pytest.approx(0.0)
    report |= {"model": "none", "machine": {}, "niceness": 10}
    assert "client: median 2.000x, p99 2.000x" in steps_while_loading.as_text(report)


def test_a_segment_has_the_gaps_that_lie_in_it_and_both_kinds_lie_as_late_in_their_rounds() -> None:
    segment = Segment(True, 10.0, 20.0)
    segment.take_gaps([8.0, 9.0, 11.0, 12.5, 20.0, 21.0])
    segment.take_gaps([1.0, 15.0])
    assert segment.gaps == [(12.5, 1.5), (20.0, 7.5)]
    places: dict[bool, list[int]] = {False: [], True: []}
    for order in steps_while_loading.ORDERS:
        for place, is_loading in enumerate(order):
            places[is_loading].append(place)
    assert sorted(places[False]) == sorted(places[True])


def test_ratios_are_told_by_the_place_in_a_round_where_both_kinds_were_there() -> None:
    segments = [
        Segment(is_loading, gaps=[(0.0, (1 + is_loading) * (place + 1))])
        for order in steps_while_loading.ORDERS
        for place, is_loading in enumerate(order)
    ]
    places = steps_while_loading.by_place([*segments, Segment(False, gaps=[(0.0, 4.0)])])
    assert [place["median_ratio"] for place in places] == pytest.approx([2 / 2.5, 2, 2, 2])
    assert steps_while_loading.by_place(segments[:4]) == []


@pytest.mark.parametrize(("cold_seconds", "is_met"), [(0.4, True), (0.5, False)])
def test_the_bound_of_a_cold_adapter_is_one_and_a_half_plain_readings_and_a_step(
    cold_seconds: float, is_met: bool
) -> None:
    samples = [Sample(state, cold_seconds, 0.1, 0.05, 0.1, 0.1, 0.1) for state in cold_adapter.STATES]
    report = cold_adapter.summarise(samples, 10**6)
    assert report["disk"]["bound_ms"] == pytest.approx(350)
    assert report["disk"]["bandwidth_bytes_per_second"] == pytest.approx(5e6)
    assert report["disk"]["is_met"] is is_met
    report |= {"model": "none", "machine": {}}
    assert ("NOT MET" in cold_adapter.as_text(report)) is not is_met


def test_a_server_of_the_bench_model_records_its_steps(tmp_path: Path) -> None:
    models = models_dir(tmp_path, tiny=True)
    folder = adapter_dir(models, 0, "per-expert")
    with serving(models) as served, cold_adapter.channel_of(served) as stub:
        sample = cold_adapter.sample(served, stub, folder, "disk")
        served.stop()
        steps = read_steps(served.steps_file)
    assert sample.cold_seconds > 0 and sample.load_seconds > 0
    assert sum(num_tokens for *_, num_tokens in steps) == 2 * cold_adapter.NUM_TOKENS
    assert any(adapter_seconds > 0 for _, _, adapter_seconds, _ in steps)
