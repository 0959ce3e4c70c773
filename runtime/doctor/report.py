"""The report: Markdown for people, and the same as a JSON block at its end for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.doctor.finding import Finding
from runtime.doctor.run import FAILED, PASSED, SKIPPED, Row

FORMAT = 1
HEADER = ("status", "operation", "phase", "shapes", "dtype", "error", "bound", "us", "GB/s", "TFLOP/s", "sizes", "note")
_BLOCK = re.compile(r"^```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Report:
    """Filled as the run goes on; `unfinished` names what has not been done yet.

    `plain_operations`: those of the table that the back-end leaves to plain PyTorch. `replaced`: operators that could
    not take what they were given, with the reason. `reduction`: by what rule large shapes were reduced, if they were.
    """

    device: str
    scale: str
    command: str
    started: str
    versions: dict[str, str]
    environment: dict[str, str]
    plain_operations: list[str]
    reduction: str = ""
    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def entries(self) -> list[Row | Finding]:
        """Everything that has a status."""
        return [*self.rows, *self.findings]

    def count(self, status: str) -> int:
        """Rows and findings of a status."""
        return sum(entry.status == status for entry in self.entries)

    @property
    def failed(self) -> list[str]:
        """Names of what failed."""
        return [entry.name for entry in self.entries if entry.status == FAILED]

    @property
    def verdict(self) -> str:
        """One sentence."""
        counts = f"{self.count(PASSED)} passed, {self.count(SKIPPED)} skipped, {self.count(FAILED)} failed"
        failed = f": {'; '.join(self.failed)}" if self.failed else ""
        unfinished = f"; not finished: {', '.join(self.unfinished)}" if self.unfinished else ""
        return f"{counts} in {self.seconds:.0f} s{failed}{unfinished}"


def markdown(report: Report) -> str:
    """The whole report."""
    return "\n".join([*_head(report), *_operations(report), *_findings(report), *_setting(report), *_json(report), ""])


def read_report(text: str) -> dict[str, Any]:
    """What the JSON block of a report holds; raises ValueError if there is none."""
    blocks = _BLOCK.findall(text)
    if not blocks:
        raise ValueError("this is no report of graft doctor: it has no JSON block")
    found: dict[str, Any] = json.loads(blocks[-1])
    return found


def _head(report: Report) -> Iterator[str]:
    yield f"# graft doctor, {report.device}: {'FAILED' if report.failed else 'passed'}"
    yield ""
    yield f"{report.verdict}."
    yield ""
    yield f"`{report.command}`, {report.started}, scale {report.scale}."
    if report.reduction:
        yield f"Reduced for this device: {report.reduction} (`--full` runs all)."
    trouble = [entry for entry in report.entries if entry.status != PASSED]
    if trouble:
        yield ""
        yield from (f"- {entry.status}: {entry.name}: {_note(entry)}" for entry in trouble)


def _note(entry: Row | Finding) -> str:
    if entry.note or not isinstance(entry, Row) or entry.error is None:
        return entry.note
    return f"error {entry.error:.2g}, bound {entry.bound:.2g}"


def _operations(report: Report) -> Iterator[str]:
    yield from ("", "## Operations", "")
    yield ("Error: the largest difference from the float32 reference, relative to its largest number. Time: the median "
           "of one call. GB/s and TFLOP/s count what must be read, written and multiplied once.")  # fmt: skip
    yield ""
    yield from table(HEADER, [row_cells(row) + (row.detail, row.remark) for row in report.rows])
    yield ""
    plain = ", ".join(report.plain_operations)
    yield f"Operations that this back-end leaves to plain PyTorch: {plain or 'none'}."
    yield "Operators that were replaced by plain PyTorch for some shapes:" + ("" if report.replaced else " none.")
    if report.replaced:
        yield ""
        yield from (f"- {line}" for line in report.replaced)


def row_cells(row: Row) -> tuple[str, ...]:
    """A row's status, name and numbers, as text; "-" for what was not measured."""
    numbers = (
        _number(row.error, ".1e"),
        _number(row.bound, ".0e"),
        _number(None if row.seconds is None else row.seconds * 1e6, ",.1f"),
        _number(row.gigabytes_per_second, ",.1f"),
        _number(row.teraflops, ",.3f"),
    )
    return row.status, row.operation, row.phase, row.shapes, row.dtype, *numbers


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _findings(report: Report) -> Iterator[str]:
    yield from ("", "## Demo, training, collectives", "")
    rows = [
        (part.status, part.name, ", ".join(f"{name} {value}" for name, value in part.facts.items()), part.note)
        for part in report.findings
    ]
    yield from table(("status", "part", "measured", "note"), rows)


def _setting(report: Report) -> Iterator[str]:
    yield from ("", "## Versions", "")
    yield from table(("what", "version"), list(report.versions.items()))
    yield from ("", "## Environment", "")
    yield from table(("variable", "value"), list(report.environment.items()))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table, or a word that it is empty."""
    if not rows:
        yield "None."
        return
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    yield from (f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)


def _cell(text: str) -> str:
    lines = text.replace("|", "\\|").splitlines()
    return "<br>".join(line.rstrip() for line in lines)


def _json(report: Report) -> Iterator[str]:
    data = {"format": FORMAT, "verdict": report.verdict, "failed": report.failed, **asdict(report)}
    yield from ("", "## For programs", "", "```json")
    yield json.dumps(_finite(data), indent=1, ensure_ascii=True)
    yield "```"


def _finite(value: Any) -> Any:
    """JSON has no word for infinity."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return value
