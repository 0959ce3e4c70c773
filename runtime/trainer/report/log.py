"""The log of a training run: a line of JSON for each step, TensorBoard scalars, and the progress line.

Writing it never ends a run: what cannot be written is told once and left out.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from runtime.trainer.report.append_file import AppendFile
from runtime.trainer.report.event_file import EventFile
from runtime.trainer.report.progress import EvalRecord, StepRecord, format_evaluation, format_line

LOG_NAME = "log.jsonl"
PREVIOUS_NAME = "log.previous.jsonl"
TENSORBOARD_NAME = "tensorboard"
TRAIN_SCALARS = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "aux_loss", "dropped_share", "epoch")

logger = logging.getLogger(__name__)

R = TypeVar("R", StepRecord, EvalRecord)


@dataclass
class RunLog:
    """What a log file says, in its order."""

    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvalRecord] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)


class TrainingLog:
    """Appends to `log.jsonl` and `tensorboard/` of one folder; for one process of a run.

    `resumed_step`: the last step that the loaded checkpoint holds; lines past it are cut off, so that each step has
    one line. None: a new run. `resumed_log`: the log of the run that goes on, if it lies elsewhere; its lines are
    copied. A log of another run that lies here is kept as `log.previous.jsonl`, `log.previous-2.jsonl` and so on.
    """

    def __init__(
        self, folder: Path, total_steps: int, *, resumed_step: int | None = None, resumed_log: Path | None = None
    ) -> None:
        """Open both logs; raises ValueError if the folder cannot be written."""
        self._total_steps = total_steps
        self._path = folder / LOG_NAME
        self._lost: dict[str, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own = resumed_step is not None and (resumed_log or self._path).resolve() == self._path.resolve()
            if not own and self._path.exists():
                self._path.replace(_unused(folder / PREVIOUS_NAME))
            if not own and resumed_log is not None and resumed_log.exists():
                shutil.copyfile(resumed_log, self._path)
            if resumed_step is not None:
                _cut(self._path, resumed_step)
            self._lines = AppendFile(self._path)
            self._scalars = _open_event_file(folder / TENSORBOARD_NAME, 0 if resumed_step is None else resumed_step + 1)
        except OSError as cause:
            message = f"{folder}: the log cannot be written there ({cause.strerror}); choose another output"
            raise ValueError(message) from None
        except ValueError as cause:
            raise ValueError(f"{cause}; move the file away to go on without its earlier lines") from None

    def step(self, record: StepRecord) -> None:
        """Log one optimizer step and show its line."""
        values = asdict(record)
        self._append("step", values)
        self._add_scalars(record.step, {f"train/{name}": values[name] for name in TRAIN_SCALARS})
        logger.info("%s", format_line(record, self._total_steps))

    def evaluation(self, record: EvalRecord) -> None:
        """Log one evaluation and show its line."""
        self._append("eval", asdict(record))
        self._add_scalars(record.step, {"eval/loss": record.loss, "eval/exact_match": record.exact_match})
        logger.info("%s", format_evaluation(record, self._total_steps))

    def event(self, step: int, name: str, **values: str | float | bool | None) -> None:
        """Log something that happened once, such as the end of a run with its peak memory; shows nothing."""
        self._append("event", {"step": step, "event": name, **values})

    def close(self) -> None:
        """Close both logs, and say how much is missing from them."""
        for what, num_lost in self._lost.items():
            logger.warning("%s lacks %d records that could not be written", what, num_lost)
        for file in (self._lines, self._scalars):
            if file is not None:
                file.close()

    def _append(self, kind: str, values: dict[str, Any]) -> None:
        finite = {name: None if _is_infinite(value) else value for name, value in values.items()}
        line = json.dumps({"kind": kind, **finite, "time": round(time.time(), 3)}, ensure_ascii=False) + "\n"
        try:
            self._lines.write(line.encode("utf-8"))
        except OSError as cause:
            self._lose(LOG_NAME, cause)

    def _add_scalars(self, step: int, scalars: dict[str, float | None]) -> None:
        if self._scalars is None:
            return
        try:
            self._scalars.add(step, {tag: value for tag, value in scalars.items() if value is not None})
        except OSError as cause:
            self._lose(TENSORBOARD_NAME, cause)

    def _lose(self, what: str, cause: OSError) -> None:
        if what not in self._lost:
            message = "%s: cannot be written (%s); training goes on, and the log does when it can"
            logger.warning(message, self._path.with_name(what), cause.strerror)
        self._lost[what] = self._lost.get(what, 0) + 1


def read_log(path: Path) -> RunLog:
    """Read a log; a last line that a kill cut short is left out. Raises OSError, or ValueError naming a bad line."""
    log = RunLog()
    for number, _, raw in _lines(path):
        try:
            kind, values = raw.pop("kind"), raw
            if kind == "step":
                log.steps.append(_record(StepRecord, values))
            elif kind == "eval":
                log.evaluations.append(_record(EvalRecord, values))
            else:
                log.events.append(values)
        except KeyError as cause:
            raise ValueError(f"{path}:{number}: the key {cause} is missing") from None
    return log


def _record(cls: type[R], values: dict[str, Any]) -> R:
    """Null stands for None where that is allowed, and else for a number that was not finite."""
    known: dict[str, Any] = {}
    for item in fields(cls):
        value = values[item.name] if item.default is MISSING else values.get(item.name)
        known[item.name] = math.nan if value is None and "None" not in str(item.type) else value
    return cls(**known)


def _lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Each whole line: its number, where it ends in bytes, its object."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                raw = json.loads(line)
            except ValueError:
                raise ValueError(f"{path}:{number}: not a line of JSON") from None
            if not isinstance(raw, dict) or not isinstance(raw.get("step"), int):
                raise ValueError(f"{path}:{number}: not a JSON object with a step")
            end += len(line)
            yield number, end, raw


def _cut(path: Path, last_step: int) -> None:
    """Keep the lines before the first of a later step, and no half line."""
    if not path.exists():
        return
    size = 0
    for _, end, raw in _lines(path):
        if raw["step"] > last_step:
            break
        size = end
    os.truncate(path, size)


def _unused(path: Path) -> Path:
    """The path, or the first of NAME-2, NAME-3, ... where nothing lies."""
    names = itertools.chain([path], (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _open_event_file(folder: Path, first_step: int) -> EventFile | None:
    try:
        return EventFile(folder, first_step)
    except ImportError:
        logger.info("no TensorBoard log: pip install 'graft-moe[train]' to have one")
        return None


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
