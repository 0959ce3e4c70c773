"""The picture of a training run: loss, evaluation, learning rate and gradient norm over the steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import Precondition
from runtime.trainer.report.log import RunLog, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING_SHARE = 0.05  # of the run: the width that the smooth line averages over
RAW_COLOUR, SMOOTH_COLOUR, EVAL_COLOUR = "#b0c4de", "#1f4e9c", "#d1495b"


def draw_curve(log_path: Path, picture: Path) -> None:
    """Write a PNG or SVG, by the suffix of `picture`.

    Raises Precondition if matplotlib is missing or the log holds no step, ValueError for a bad line, OSError.
    """
    log = read_log(log_path)
    if not log.steps:
        raise Precondition(f"{log_path}: no step to draw yet", reason="EMPTY_LOG")
    try:
        from matplotlib.figure import Figure
    except ImportError as cause:
        message = "the loss curve needs matplotlib: pip install 'graft-moe[train]'"
        raise Precondition(message, reason="MATPLOTLIB_MISSING") from cause
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache at INFO
    figure = Figure(figsize=(10, 8), layout="constrained")
    loss, rest = figure.subplots(2, 1, height_ratios=(2, 1), sharex=True)
    _draw_loss(loss, log)
    _draw_rate(rest, log)
    figure.savefig(picture, dpi=130)


def smooth(values: Sequence[float], width: float) -> list[float]:
    """Exponential mean over about `width` values, without a bias towards a start at zero; skips NaN."""
    keep = 1 - 1 / max(width, 1.0)
    total, weight, means = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight if weight else math.nan)
    return means


def _draw_loss(axes: Axes, log: RunLog) -> None:
    steps, losses = [record.step for record in log.steps], [record.loss for record in log.steps]
    axes.plot(steps, losses, color=RAW_COLOUR, linewidth=1, label="loss of a step")
    axes.plot(steps, smooth(losses, SMOOTHING_SHARE * len(losses)), color=SMOOTH_COLOUR, linewidth=2, label="smoothed")
    evaluated = [record.step for record in log.evaluations]
    axes.plot(
        evaluated, [e.loss for e in log.evaluations], "o-", color=EVAL_COLOUR, label="evaluation" if evaluated else None
    )
    axes.set_ylabel("loss per target token (nats)")
    axes.grid(alpha=0.3)
    matched = [(e.step, e.exact_match) for e in log.evaluations if e.exact_match is not None]
    if matched:
        right = axes.twinx()
        right.plot(*zip(*matched, strict=True), "s--", color=EVAL_COLOUR, alpha=0.6)
        axes.plot([], [], "s--", color=EVAL_COLOUR, alpha=0.6, label="exact match (right)")
        right.set_ylim(-0.02, 1.02)
        right.set_ylabel("exact match")
        _put_in_front(axes, right)
    axes.legend(fontsize=9, loc="best")
    last = log.steps[-1]
    axes.set_title(f"{last.step} steps, {sum(record.tokens for record in log.steps):,} tokens", fontsize=10)


def _draw_rate(axes: Axes, log: RunLog) -> None:
    steps = [record.step for record in log.steps]
    axes.plot(steps, [record.lr for record in log.steps], color=SMOOTH_COLOUR, label="learning rate")
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(steps, [record.grad_norm for record in log.steps], color="#b8b8b8", linewidth=1)
    axes.plot([], [], color="#b8b8b8", linewidth=1, label="gradient norm before clipping (right)")
    right.set_ylabel("gradient norm")
    right.set_ylim(bottom=0)
    _put_in_front(axes, right)
    axes.legend(fontsize=9, loc="best")


def _put_in_front(axes: Axes, right: Axes) -> None:
    """Draw `axes` and its legend over the curves of the right-hand scale."""
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
