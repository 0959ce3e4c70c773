"""What an MFU is a share of, and by which convention, is told once at the start; or that there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.trainer.report.flops import CONVENTION, PEAK
from tests.trainer.runs.demo import Graft, log_lines, write_config

PEAK_FLOPS = 2.5e9


@pytest.mark.parametrize(
    ("measured", "line"),
    [
        (True, f"MFU: {CONVENTION}; {PEAK}, 2.5e+09 FLOP/s over all processes"),
        (False, "no MFU: measure_mfu is false, so the peak is not known"),
    ],
)
def test_a_run_tells_convention_and_peak_before_its_first_step(
    graft: Graft, tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    measured: bool, line: str,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "runtime.trainer")
    monkeypatch.setattr("runtime.trainer.report.run_report.measure_peak", lambda device, dtype: PEAK_FLOPS)
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out", steps=1, save_every=0, measure_mfu=measured)
    assert graft("train", config).status == 0
    told = [number for number, record in enumerate(caplog.messages) if record.startswith(line)]
    steps = [number for number, record in enumerate(caplog.messages) if record.startswith("step ")]
    assert len(told) == 1 and told[0] < steps[0]
    assert ("MFU" in caplog.messages[steps[0]]) == measured
    (start,) = (event for event in log_lines(tmp_path / "out", "event") if event["event"] == "start")
    assert start["flops_convention"] == CONVENTION
    assert start["peak_flops_per_second"] == (PEAK_FLOPS if measured else None)
