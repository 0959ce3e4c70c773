"""`graft bench`: load for a running server; a table, a JSON file and a picture."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.bench.lengths import Lengths, parse_lengths
from runtime.bench.picture import SUFFIXES, draw
from runtime.bench.plan import BASE, BenchPlan
from runtime.bench.report import Report, build_report
from runtime.bench.run import run_bench
from runtime.commands.adapters import table
from runtime.errors import Precondition

DEFAULTS = BenchPlan("")
LATENCIES = {"ttft": "ttft_seconds", "itl": "itl_seconds", "e2e": "e2e_seconds", "queue": "queue_seconds"}
SERVER_TIMES = ("queue", "prefill", "decode")
BUSY_CLIENT_SHARE = 0.8


def run(options: argparse.Namespace) -> int:
    """0 if a request succeeded and everything asked for was written."""
    plan = build_plan(options)
    picture = None if options.no_picture else (options.picture or options.out.with_suffix(".png"))
    _check_paths(options.out, picture)
    result = asyncio.run(run_bench(plan))
    report = build_report(result, shlex.join(["graft", *options.arguments]))
    _say(*_tables(report), *_remarks(report))
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _say(f"written: {options.out}")
    status = 0 if report["overall"]["requests"] else 1
    if picture is None:
        return status
    try:
        draw(report, result.records, picture)
    except Precondition as error:
        sys.stderr.write(f"graft: {error}\n")
        return 1
    _say(f"written: {picture}")
    return status


def build_plan(options: argparse.Namespace) -> BenchPlan:
    """The plan that the arguments describe; raises ValueError."""
    if options.prompts and options.prompt_tokens:
        raise ValueError("--prompt-tokens is for made-up prompts; those of --prompts have their own lengths")
    adapters = tuple(_name_and_weight(text) for text in options.adapter) or DEFAULTS.adapters
    concurrency = options.concurrency
    if concurrency is None:
        concurrency = 0 if options.rate is not None else DEFAULTS.concurrency
    plan = BenchPlan(
        server=options.server,
        num_requests=DEFAULTS.num_requests if options.requests is None else options.requests,
        seconds=_positive("--seconds", options.seconds),
        concurrency=concurrency,
        rate=_positive("--rate", options.rate),
        adapters=adapters,
        prompt_tokens=_lengths(options.prompt_tokens, "--prompt-tokens", DEFAULTS.prompt_tokens),
        output_tokens=_lengths(options.output_tokens, "--output-tokens", DEFAULTS.output_tokens),
        prompts_path=options.prompts,
        stop_at_eos=options.stop_at_eos,
        temperature=options.temperature,
        seed=options.seed,
        num_warmup=max(DEFAULTS.num_warmup, len(adapters)) if options.warmup is None else options.warmup,
        timeout_seconds=options.timeout,
        num_connections=options.connections,
        metrics_address=options.metrics or "",
    )
    plan.validate()
    return plan


def _positive(name: str, value: float | None) -> float:
    """Zero means "not given" inside a plan, so it cannot be given."""
    if value is not None and not value > 0:
        raise ValueError(f"{name} = {value} is out of range: > 0")
    return value or 0.0


def _lengths(text: str | None, name: str, default: Lengths) -> Lengths:
    return default if text is None else parse_lengths(text, name)


def _name_and_weight(text: str) -> tuple[str, float]:
    """`NAME=WEIGHT` or `NAME`; the base is "" or `base`."""
    name, separator, weight = text.partition("=")
    try:
        return BASE if name == "base" else name, float(weight) if separator else 1.0
    except ValueError as error:
        raise ValueError(f"--adapter {text!r} is not NAME=WEIGHT") from error


def _check_paths(out: Path, picture: Path | None) -> None:
    """What cannot be written is said before the load, not after it."""
    for path in (out, picture):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} for {path.name}")
    if picture is not None and picture.suffix not in SUFFIXES:
        raise ValueError(f"--picture {picture}: the name must end with {' or '.join(SUFFIXES)}")


def _tables(report: Report) -> Iterator[str]:
    groups = [("all", report["overall"])]
    if len(report["adapters"]) > 1:
        groups += [(group["adapter"] or "(base)", group) for group in report["adapters"]]
    rates = ("requests_per_second", "prompt_tokens_per_second", "output_tokens_per_second")
    rows = [
        (name, str(group["requests"]), str(group["failed"]), *(_number(group[rate]) for rate in rates))
        for name, group in groups
    ]
    yield from table(("ADAPTER", "REQUESTS", "FAILED", "REQUESTS/S", "PROMPT TOKENS/S", "OUTPUT TOKENS/S"), rows)
    yield ""
    answered = [(name, group) for name, group in groups if group["requests"]]
    latencies = [(name, shown, group[key]) for name, group in answered for shown, key in LATENCIES.items()]
    columns = ("mean", "p50", "p90", "p99", "max")
    yield from table(
        ("ADAPTER", "MILLISECONDS", "COUNT", *(column.upper() for column in columns)),
        [
            (name, shown, f"{summary['count']:,}", *(_number(summary[column], 1000) for column in columns))
            for name, shown, summary in latencies
        ],
    )


def _remarks(report: Report) -> Iterator[str]:
    yield ""
    yield f"over {report['window_seconds']:.2f} s, timed from the {report['plan']['timed_from'].replace('_', ' ')}"
    for name in SERVER_TIMES if report["server_metrics"] else ():
        seen = report["server_metrics"][f"{name}_seconds"]
        yield f"server: {name} {_number(seen['mean'], 1000)} ms in the mean of {seen['count']:,}"
    yield from _error_lines(report["overall"]["errors"], "failed")
    yield from _error_lines(report["warmup"]["errors"], "failed while warming up")
    if report["client_cpu_share"] > BUSY_CLIENT_SHARE:
        yield f"the client used {report['client_cpu_share']:.0%} of a core: it may have been the bottleneck itself"


def _error_lines(errors: list[dict[str, Any]], what: str) -> Iterator[str]:
    for error in errors:
        yield f"{error['count']} {what}: {error['code']} {error['reason']}: {error['example']}"


def _number(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:,.2f}"


def _say(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(line + "\n")
    sys.stdout.flush()
