"""The picture of a run: how the latencies are distributed, for each adapter, and the throughput over time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.bench.record import RequestRecord
from runtime.bench.report import Report
from runtime.errors import Precondition

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
MAX_LINES = 8  # adapters with a curve of their own, those with the most requests; more cannot be told apart
MAX_POINTS = 2000  # of one curve: an SVG of every gap would be megabytes
OVERALL_COLOUR = "#222222"

Values = Callable[[RequestRecord], Sequence[float]]
PANELS: tuple[tuple[str, Values], ...] = (
    ("time to first token", lambda record: [] if record.ttft_seconds is None else [record.ttft_seconds]),
    ("between tokens", lambda record: record.gaps_seconds),
    ("whole request", lambda record: [record.e2e_seconds]),
)


def draw(report: Report, records: Sequence[RequestRecord], path: Path) -> None:
    """Write a PNG or SVG, by the suffix of `path`; raises Precondition if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "a picture needs matplotlib: pip install 'graft-moe[bench]', or ask for none with --no-picture"
        raise Precondition(message, reason="MATPLOTLIB_MISSING") from error
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache at INFO
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2).flat
    curves = _curves([record for record in records if record.error is None])
    for axes, (title, values) in zip(panels, PANELS, strict=False):
        _draw_distributions(axes, title, values, curves)
    _draw_timeline(panels[3], report)
    overall = report["overall"]
    figure.suptitle(
        f"{report['command']}\n{overall['requests']} requests, {overall['failed']} failed, "
        f"{overall['output_tokens_per_second'] or 0:.1f} output tokens/s",
        fontsize=9,
        wrap=True,
    )
    figure.savefig(path, dpi=130)


def _curves(records: Sequence[RequestRecord]) -> dict[str, list[RequestRecord]]:
    """All requests, and, if there are several adapters, those of the ones with most of them."""
    groups: dict[str, list[RequestRecord]] = {}
    for record in records:
        groups.setdefault(record.adapter or "(base)", []).append(record)
    if len(groups) < 2:
        return {"all": list(records)}
    busiest = sorted(groups, key=lambda name: (-len(groups[name]), name))[:MAX_LINES]
    return {"all": list(records), **{name: groups[name] for name in sorted(busiest)}}


def _draw_distributions(axes: Axes, title: str, values: Values, curves: dict[str, list[RequestRecord]]) -> None:
    """The share of observations at or below each latency."""
    for name, records in curves.items():
        ordered = sorted(1000 * value for record in records for value in values(record))
        if not ordered:
            continue
        step = max(1, len(ordered) // MAX_POINTS)
        places = [*range(0, len(ordered), step), len(ordered) - 1]
        style = {"color": OVERALL_COLOUR, "linewidth": 2.0} if name == "all" else {"linewidth": 1.0}
        shares = [(place + 1) / len(ordered) for place in places]
        axes.plot([ordered[place] for place in places], shares, label=name, drawstyle="steps-post", **style)
    axes.set_title(f"{title}, share of observations", fontsize=10)
    axes.set_xlabel("milliseconds")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize=8, loc="lower right")


def _draw_timeline(axes: Axes, report: Report) -> None:
    timeline = report["timeline"]
    tokens = timeline["output_tokens_per_second"]
    edges = [index * timeline["bin_seconds"] for index in range(len(tokens) + 1)]
    axes.stairs(tokens, edges, color=OVERALL_COLOUR, linewidth=1.5)
    axes.axvline(report["window_seconds"], color="#999999", linestyle=":", linewidth=1)
    axes.set_title("output tokens/s over time (dotted: end of the window)", fontsize=10)
    axes.set_xlabel("seconds")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
