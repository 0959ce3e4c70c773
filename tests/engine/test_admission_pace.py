"""The estimated wait follows the pace of admissions while requests wait, and nothing else."""

from __future__ import annotations

import pytest

from runtime.engine.admission_pace import WINDOW_SECONDS, AdmissionPace


def test_nothing_waits_no_time() -> None:
    pace = AdmissionPace()
    pace.update(1.0, num_admitted=4, num_left=0)
    assert pace.wait_seconds(1.0, 0) == 0 and pace.wait_seconds(1.0, 7) == 0


@pytest.mark.parametrize("seconds", [5.0, 60.0])
def test_a_steady_queue_waits_its_length_over_its_pace(seconds: float) -> None:
    """Four admissions a second, in steps of a tenth of a second: 20 waiting need five seconds."""
    pace = AdmissionPace()
    for step in range(int(10 * seconds) + 1):
        pace.update(100.0 + step / 10, num_admitted=2 if step % 5 == 0 else 0, num_left=20)
    assert pace.wait_seconds(100.0 + seconds, 20) == pytest.approx(5.0, rel=0.15)


def test_idle_time_before_the_queue_does_not_count() -> None:
    """One request now and then, all admitted at once, say nothing of how fast a burst is served."""
    pace = AdmissionPace()
    for second in range(9):
        pace.update(float(second), num_admitted=1, num_left=0)
    pace.update(9.0, num_admitted=64, num_left=100)
    assert pace.wait_seconds(9.0, 100) < 1.0


def test_without_admissions_the_wait_is_at_least_what_has_been_waited() -> None:
    pace = AdmissionPace()
    pace.update(0.0, num_admitted=8, num_left=3)
    for second in range(1, 31):
        pace.update(float(second), num_admitted=0, num_left=3)
    assert pace.wait_seconds(30.0, 3) == 30.0
    pace.update(31.0, num_admitted=0, num_left=0)
    pace.update(32.0, num_admitted=0, num_left=1)
    assert pace.wait_seconds(34.0, 1) == 2.0


def test_admissions_are_forgotten_after_the_window() -> None:
    pace = AdmissionPace()
    pace.update(0.0, num_admitted=1000, num_left=10)
    pace.update(1.0, num_admitted=10, num_left=10)
    assert pace.wait_seconds(1.0, 10) == pytest.approx(10 / 1010)
    pace.update(WINDOW_SECONDS + 0.5, num_admitted=0, num_left=10)
    assert pace.wait_seconds(WINDOW_SECONDS + 0.5, 10) == pytest.approx(WINDOW_SECONDS)
