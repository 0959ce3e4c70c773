"""The loss curve: a picture of the log, and a sentence where there can be none."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from matplotlib import image

from runtime.errors import Precondition
from runtime.trainer.report.curve import draw_curve, smooth
from runtime.trainer.report.log import TrainingLog
from runtime.trainer.report.progress import EvalRecord, StepRecord


def write_log(folder: Path, num_steps: int, *, evaluate: bool = True) -> Path:
    log = TrainingLog(folder, num_steps)
    for step in range(1, num_steps + 1):
        log.step(StepRecord(step, 0.0, 3 / step, 1e-4, 1.0, 512, 300, 0.5, 1024.0, 0.0))
        if evaluate and step % 10 == 0:
            log.evaluation(EvalRecord(step, 3.2 / step, step / num_steps, 40))
    log.close()
    return folder / "log.jsonl"


@pytest.mark.parametrize(("num_steps", "evaluate"), [(40, True), (40, False), (1, False)])
def test_the_curve_is_a_picture_of_some_size(tmp_path: Path, num_steps: int, evaluate: bool) -> None:
    draw_curve(write_log(tmp_path, num_steps, evaluate=evaluate), tmp_path / "loss.png")
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[:2] == (1040, 1300)
    assert len({tuple(pixel) for pixel in pixels[::7, ::7, :3].reshape(-1, 3).tolist()}) > 3


def test_the_curve_names_all_that_it_shows(tmp_path: Path) -> None:
    draw_curve(write_log(tmp_path, 40), tmp_path / "loss.svg")
    text = (tmp_path / "loss.svg").read_text(encoding="utf-8")
    for label in ("loss of a step", "smoothed", "evaluation", "exact match", "learning rate", "gradient norm"):
        assert f"<!-- {label}" in text


def test_smoothing_keeps_a_constant_and_passes_over_what_is_no_number() -> None:
    assert smooth([2.0] * 5, 3) == pytest.approx([2.0] * 5)
    assert smooth([4.0, math.nan, 4.0], 3) == pytest.approx([4.0] * 3)
    assert smooth([0.0, 1.0, 0.0, 1.0], 1) == [0.0, 1.0, 0.0, 1.0]
    wavy = smooth([0.0, 1.0] * 50, 10)
    assert max(wavy[-10:]) - min(wavy[-10:]) < 0.2


def test_an_empty_log_and_a_missing_matplotlib_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Precondition, match="no step to draw yet"):
        draw_curve(write_log(tmp_path, 0), tmp_path / "loss.png")
    path = write_log(tmp_path, 3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Precondition, match=r"pip install 'graft-moe\[train\]'"):
        draw_curve(path, tmp_path / "loss.png")
