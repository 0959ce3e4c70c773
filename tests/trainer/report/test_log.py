"""The training log: what is written is read back, a resume continues it, and a disk that is full ends nothing."""

from __future__ import annotations

import json
import logging
import math
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime.trainer.report.log import TrainingLog, read_log
from runtime.trainer.report.progress import EvalRecord, StepRecord

RECORD = StepRecord(
    step=1,
    epoch=0.1,
    loss=2.5,
    lr=2e-4,
    grad_norm=0.7,
    tokens=512,
    target_tokens=300,
    seconds=0.5,
    tokens_per_second=1024.0,
    eta_seconds=9.5,
)


def record(step: int) -> StepRecord:
    return replace(RECORD, step=step, loss=3.0 / step)


def write(folder: Path, first: int, last: int, resumed_step: int | None = None) -> None:
    log = TrainingLog(folder, 10, resumed_step=resumed_step)
    for step in range(first, last + 1):
        log.step(record(step))
    log.close()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_what_is_logged_is_read_back(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 10)
    steps = [record(1), replace(record(2), mfu=0.4, aux_loss=0.01, dropped_share=0.0)]
    evaluations = [EvalRecord(2, 1.5, 0.25, 40), EvalRecord(2, 1.25, None, 40)]
    log.event(0, "start", resumed=False)
    for step in steps:
        log.step(step)
    for evaluation in evaluations:
        log.evaluation(evaluation)
    log.close()
    found = read_log(tmp_path / "log.jsonl")
    assert (found.steps, found.evaluations) == (steps, evaluations)
    assert found.events[0]["event"] == "start"


def test_each_line_is_on_disk_at_once_and_is_strict_json(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 10)
    log.step(replace(RECORD, loss=math.nan, grad_norm=math.inf))
    text = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    line = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (line["kind"], line["step"], line["loss"]) == ("step", 1, None)
    assert math.isnan(read_log(tmp_path / "log.jsonl").steps[0].loss)
    log.close()


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 10)
    log.step(record(1))
    log.step(record(2))
    log.evaluation(EvalRecord(2, 1.5, 0.25, 40))
    assert scalars(tmp_path, "train/loss") == [(1, 3.0), (2, 1.5)]
    assert scalars(tmp_path, "eval/exact_match") == [(2, 0.25)]
    log.close()


def test_after_a_resume_each_step_has_one_line_and_one_scalar(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "st')  # what a kill leaves
    assert len(read_log(tmp_path / "log.jsonl").steps) == 5
    write(tmp_path, 4, 6, resumed_step=3)
    assert read_log(tmp_path / "log.jsonl").steps == [record(step) for step in range(1, 7)]
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_resume_cuts_a_half_line_that_follows_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1, 3)
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "st')
    write(tmp_path, 4, 4, resumed_step=3)
    assert [found.step for found in read_log(tmp_path / "log.jsonl").steps] == [1, 2, 3, 4]


def test_a_new_run_keeps_the_log_that_lay_there(tmp_path: Path) -> None:
    write(tmp_path, 1, 3)
    write(tmp_path, 1, 1)
    assert len(read_log(tmp_path / "log.jsonl").steps) == 1
    assert len(read_log(tmp_path / "log.previous.jsonl").steps) == 3
    write(tmp_path, 1, 1)
    kept = [len(read_log(tmp_path / f"log.previous{number}.jsonl").steps) for number in ("", "-2")]
    assert kept == [3, 1], "a third run takes nothing from the first"
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1]


@contextmanager
def no_file_longer_than(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_once_and_the_log_goes_on_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = TrainingLog(tmp_path, 10)
    log.step(record(1))
    room = (tmp_path / "log.jsonl").stat().st_size + 40  # for a part of the next line
    with no_file_longer_than(room):
        log.step(record(2))
        log.step(record(3))
    log.step(record(4))
    assert [found.step for found in read_log(tmp_path / "log.jsonl").steps] == [1, 4]
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert len([text for text in warnings if "log.jsonl: cannot be written" in text]) == 1
    log.close()
    assert "log.jsonl lacks 2 records that could not be written" in caplog.text


def test_a_disk_that_fills_up_under_tensorboard_leaves_its_file_readable(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 10)
    log.step(record(1))
    (events,) = (tmp_path / "tensorboard").iterdir()
    with no_file_longer_than(events.stat().st_size + 20):
        log.step(record(2))
    log.step(record(3))
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 3]
    log.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"file/run: the log cannot be written there .* choose another output"):
        TrainingLog(tmp_path / "file" / "run", 10)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(tmp_path, 1, 1)
    path.write_text(path.read_text(encoding="utf-8") + "loss 3.5\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"log\.jsonl:2: not a line of JSON"):
        read_log(path)
    with pytest.raises(ValueError, match=r"log\.jsonl:2: .* move the file away"):
        TrainingLog(tmp_path, 10, resumed_step=5)
    path.write_text('{"kind": "step", "step": 1, "loss": 2.0}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"log\.jsonl:1: the key 'epoch' is missing"):
        read_log(path)


def test_without_tensorboard_the_lines_are_written_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with caplog.at_level(logging.INFO):
        write(tmp_path, 1, 3)
    assert caplog.text.count("pip install 'graft-moe[train]'") == 1
    assert len(read_log(tmp_path / "log.jsonl").steps) == 3
    assert not list((tmp_path / "tensorboard").glob("*"))


def test_the_log_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys; import runtime.trainer.report.log; print({'torch', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
