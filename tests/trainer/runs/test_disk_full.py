"""A disk without room: what was written before stays, what was not is said, and nothing half written is left."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest

from runtime.cli import main
from runtime.trainer.checkpoint import check_files, checkpoints
from tests.trainer.runs.demo import Graft, adapter_bytes, losses, write_config

NO_ROOM = OSError(errno.ENOSPC, "No space left on device")
WRITERS = {
    "checkpoint": "runtime.trainer.checkpoint._finish",
    "adapter": "runtime.trainer.export.adapter_files.write_safetensors",
}


@contextmanager
def no_room_for(*what: str) -> Iterator[None]:
    with ExitStack() as stack:
        for name in what:
            stack.enter_context(mock.patch(WRITERS[name], side_effect=NO_ROOM))
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """The output of a run with a disk that has room."""
    folder = tmp_path_factory.mktemp("good")
    assert main(["train", str(write_config(folder / "run.yaml", rows, folder / "out"))]) == 0
    return folder / "out"


def test_checkpoints_that_cannot_be_written_are_told_and_training_goes_on(
    graft: Graft, tmp_path: Path, rows: Path, good: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    with no_room_for("checkpoint"):
        said = graft("train", write_config(tmp_path / "run.yaml", rows, output))
    assert said.status == 0, said.err
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    reason = "the checkpoint cannot be written (No space left on device); training goes on; whole checkpoints: none"
    assert told[0] == f"{output}/checkpoints/step-00000002: {reason}"
    assert len(told) == 3 and list((output / "checkpoints").iterdir()) == []
    assert losses(output) == losses(good) and adapter_bytes(output) == adapter_bytes(good)


def test_a_checkpoint_that_cannot_be_written_leaves_those_that_are_there(
    graft: Graft, tmp_path: Path, rows: Path
) -> None:
    output, config = tmp_path / "out", tmp_path / "run.yaml"
    assert graft("train", write_config(config, rows, output, keep_checkpoints=3)).status == 0
    (output / "checkpoints" / "step-00000006").rename(tmp_path / "away")
    with no_room_for("checkpoint"):
        assert graft("train", config, "--resume").status == 0
    kept = checkpoints(output / "checkpoints")
    assert [path.name for path in kept] == ["step-00000002", "step-00000004"]
    for path in kept:
        check_files(path)


def test_an_adapter_that_cannot_be_written_ends_the_run_and_is_written_when_there_is_room(
    graft: Graft, tmp_path: Path, rows: Path, good: Path
) -> None:
    output, config = tmp_path / "out", tmp_path / "run.yaml"
    with no_room_for("adapter"):
        said = graft("train", write_config(config, rows, output))
    assert said.status == 1 and said.messages == [
        f"graft train: {output}/adapter: cannot be written (No space left on device); nothing was left there; "
        "checkpoint step-00000006 is whole: make room, then go on with --resume"
    ]
    assert not list(output.glob("*adapter*")) and not list(output.glob(".*adapter*"))
    check_files(output / "checkpoints" / "step-00000006")
    assert graft("train", config, "--resume").status == 0
    assert adapter_bytes(output) == adapter_bytes(good) and losses(output) == losses(good)


def test_a_run_without_checkpoints_makes_one_when_its_adapter_cannot_be_written(
    graft: Graft, tmp_path: Path, rows: Path, good: Path
) -> None:
    output, config = tmp_path / "out", tmp_path / "run.yaml"
    with no_room_for("adapter"):
        said = graft("train", write_config(config, rows, output, save_every=0))
    assert said.status == 1 and "checkpoint step-00000006 is whole" in said.messages[0]
    assert graft("train", config, "--resume").status == 0
    assert adapter_bytes(output) == adapter_bytes(good)


def test_when_neither_can_be_written_that_is_said(graft: Graft, tmp_path: Path, rows: Path) -> None:
    with no_room_for("adapter", "checkpoint"):
        said = graft("train", write_config(tmp_path / "run.yaml", rows, tmp_path / "out", steps=1))
    assert said.status == 1 and len(said.messages) == 1
    assert said.messages[0].endswith("no checkpoint could be written either: make room, and train again")
