"""The progress line: all that people ask of it, in columns that do not move."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.trainer.report.progress import (
    EvalRecord,
    StepRecord,
    format_duration,
    format_evaluation,
    format_line,
)

RECORD = StepRecord(
    step=7,
    epoch=0.25,
    loss=1.23456,
    lr=2e-4,
    grad_norm=0.512,
    tokens=4096,
    target_tokens=2000,
    seconds=3.5,
    tokens_per_second=1170.3,
    eta_seconds=3723.4,
    mfu=0.4123,
)


def test_the_line_says_what_people_expect() -> None:
    line = format_line(RECORD, 1000)
    for part in ("step    7/1000", "1.2346", "2.00e-04", "0.512", "1,170 tokens/s", "MFU  41.2%", "left  1:02:03"):
        assert part in line


def test_lines_of_a_run_have_equal_columns() -> None:
    late = replace(RECORD, step=1000, loss=12.0, grad_norm=123.4, tokens_per_second=98765.0, eta_seconds=0.0, mfu=0.05)
    first, last = format_line(RECORD, 1000), format_line(late, 1000)
    assert len(first) == len(last)
    assert [first.index(word) for word in ("loss", "lr", "MFU", "left")] == [
        last.index(word) for word in ("loss", "lr", "MFU", "left")
    ]
    assert first.index("loss") == format_evaluation(EvalRecord(7, 1.0, 0.5, 12), 1000).index("loss")


def test_what_was_not_measured_is_not_shown() -> None:
    plain = format_line(replace(RECORD, mfu=None), 1000)
    assert not any(word in plain for word in ("MFU", "balance", "dropped"))
    full = format_line(replace(RECORD, aux_loss=0.0123, dropped_share=0.005), 1000)
    assert "balance loss   0.0123" in full
    assert "dropped  0.50%" in full


def test_an_evaluation_shows_its_exact_match() -> None:
    assert "exact match 87.5%  (1,200 documents)" in format_evaluation(EvalRecord(7, 0.4, 0.875, 1200), 1000)
    assert "exact" not in format_evaluation(EvalRecord(7, 0.4, None, 1200), 1000)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (86399, "23:59:59"), (180061, "2d 2:01:01")]
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
