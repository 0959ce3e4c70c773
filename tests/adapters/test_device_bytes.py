"""What adapters take on the device, by the benchmark that prints it beside dense slots, at a small size."""

from __future__ import annotations

from pathlib import Path

from benchmarks.device_bytes import ASKED_RATIO, ASKED_TIMES, Case, measure_cases, measure_fit
from benchmarks.make_model import TINY
from tests.conftest import RecordNumber

CASES = (
    Case("all experts, rank 8", (8,), 1.0),
    Case("all experts, ranks 8 to 64 mixed", (8, 16, 32, 64), 1.0),
    Case("10 % of the experts, rank 64", (64,), 0.1),
    Case("10 % of the experts, ranks 8 to 64 mixed", (8, 16, 32, 64), 0.1),
)


def test_pages_of_mixed_ranks_and_coverage_take_the_bytes_of_the_tensors(
    tmp_path: Path, record_number: RecordNumber
) -> None:
    rows = measure_cases(tmp_path, TINY, CASES)
    assert len(rows) == len(CASES) + 1
    for row in rows:
        name = f"{row['name']}: device bytes / own tensors' bytes, by the store"
        record_number(name, row["ratio"], at_least=1.0, at_most=ASKED_RATIO)
    assert rows[-1]["dense_bytes"] > 3 * rows[-1]["device_bytes"]


def test_where_two_full_adapters_fit_eight_times_as_many_of_a_tenth_of_the_experts_do(
    tmp_path: Path, record_number: RecordNumber
) -> None:
    fit = measure_fit(tmp_path, TINY, num_full=2)
    assert fit["full"] == 2
    record_number("adapters of 10 % coverage per full one, at one budget", fit["times"], at_least=ASKED_TIMES)
