"""A run that was killed goes on as if it had not been: the same losses, the same adapter to the byte."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from runtime.trainer.checkpoint import checkpoints
from tests.server.live import eventually
from tests.trainer.runs.demo import (
    NUM_STEPS,
    OPTIONS,
    Graft,
    adapter_bytes,
    finish,
    log_lines,
    losses,
    start,
    write_config,
)


def compare(unbroken: Path, resumed: Path) -> None:
    assert losses(resumed) == losses(unbroken)
    assert [step for step, _, _ in losses(resumed)] == list(range(1, NUM_STEPS + 1)), "each step has one line"
    scores = [[(line["step"], line["loss"]) for line in log_lines(o, "eval")] for o in (resumed, unbroken)]
    assert scores[0] == scores[1] and scores[0]
    assert adapter_bytes(resumed) == adapter_bytes(unbroken)
    assert adapter_bytes(resumed, "adapter-best") == adapter_bytes(unbroken, "adapter-best")


def unbroken_run(graft: Graft, tmp_path: Path, rows: Path, **changes: Any) -> Path:
    output = tmp_path / "unbroken"
    said = graft("train", write_config(tmp_path / "unbroken.yaml", rows, output, **changes))
    assert said.status == 0, said.err
    return output


def test_a_run_killed_after_a_checkpoint_goes_on_as_if_it_had_not_been(
    graft: Graft, tmp_path: Path, rows: Path
) -> None:
    unbroken = unbroken_run(graft, tmp_path, rows)
    output = tmp_path / "killed"
    config = write_config(tmp_path / "killed.yaml", rows, output)
    process = start("runtime.trainer", config)
    assert eventually(lambda: bool(checkpoints(output / "checkpoints")) or process.poll() is not None, 120)
    process.kill()
    assert finish(process).status == -signal.SIGKILL and not (output / "adapter").exists()
    said = graft("train", config, "--resume")
    assert said.status == 0, said.err
    compare(unbroken, output)


def test_a_run_killed_while_it_wrote_a_checkpoint_goes_on_from_the_one_before_with_every_option(
    graft: Graft, tmp_path: Path, rows: Path
) -> None:
    unbroken = unbroken_run(graft, tmp_path, rows, **OPTIONS)
    output = tmp_path / "killed"
    config = write_config(tmp_path / "killed.yaml", rows, output, **OPTIONS)
    died = finish(start("tests.trainer.runs.dying", 4, config))
    assert died.status == -signal.SIGKILL, died.err
    folder = output / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".step-00000004.partial", "step-00000002"]
    assert losses(output)[-1][0] == 4, "the log is ahead of the checkpoint"
    said = graft("train", config, "--resume")
    assert said.status == 0, said.err
    compare(unbroken, output)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]


def test_a_finished_run_that_is_resumed_writes_its_adapter_again(graft: Graft, tmp_path: Path, rows: Path) -> None:
    output = unbroken_run(graft, tmp_path, rows, **OPTIONS)
    before, lines, card = adapter_bytes(output), losses(output), (output / "adapter" / "README.md").read_text()
    shutil.rmtree(output / "adapter")
    assert graft("train", tmp_path / "unbroken.yaml", "--resume").status == 0
    assert adapter_bytes(output) == before and losses(output) == lines
    assert (output / "adapter" / "README.md").read_text() == card and "eval exact match" in card


def test_going_back_over_later_checkpoints_is_refused_and_the_offered_folder_takes_the_run(
    graft: Graft, tmp_path: Path, rows: Path
) -> None:
    output = unbroken_run(graft, tmp_path, rows, keep_checkpoints=9)
    config, before = tmp_path / "unbroken.yaml", _contents(output)
    said = graft("train", config, "--resume", "step-00000002")
    back = output / "checkpoints" / "step-00000002"
    assert said.status == 1 and said.messages == [
        f"graft train: {output} holds checkpoints after step-00000002 (step-00000004, step-00000006), which this run "
        f"would replace: go on in a new folder, for instance with --resume {back} "
        f"--set output={output}-from-step-00000002, or move those away first"
    ]
    other = tmp_path / "unbroken-from-step-00000002"
    assert graft("train", config, "--resume", back, "--set", f"output={other}").status == 0
    assert _contents(output) == before, "nothing of the first run is lost"
    compare(output, other)
    assert [path.name for path in checkpoints(other / "checkpoints")] == ["step-00000004", "step-00000006"]


def test_going_on_among_the_checkpoints_of_another_run_is_refused(graft: Graft, tmp_path: Path, rows: Path) -> None:
    output = unbroken_run(graft, tmp_path, rows)
    other = tmp_path / "other"
    assert graft("train", write_config(tmp_path / "other.yaml", rows, other, steps=2, seed=3)).status == 0
    before = _contents(other)
    newest = output / "checkpoints" / "step-00000006"
    said = graft("train", tmp_path / "unbroken.yaml", "--resume", newest, "--set", f"output={other}")
    assert said.status == 1 and len(said.messages) == 1
    assert f"{other} holds checkpoints of another run (step-00000002), which this run would" in said.messages[0]
    assert _contents(other) == before


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_best_checkpoint_is_kept_beside_the_newest(graft: Graft, tmp_path: Path, rows: Path) -> None:
    """A learning rate that is far too high makes the first evaluation the best; no other save is due before the end."""
    output = unbroken_run(
        graft, tmp_path, rows, save_every=100, eval_every=1, keep_checkpoints=1,
        lora={"targets": ["experts"]}, optimizer={"lr": 0.5, "schedule": "constant"},
    )  # fmt: skip
    scores = {line["step"]: line["loss"] for line in log_lines(output, "eval")}
    best = min(scores, key=lambda step: scores[step])
    assert best < NUM_STEPS
    names = [path.name for path in checkpoints(output / "checkpoints")]
    assert names == [f"step-{best:08d}", f"step-{NUM_STEPS:08d}"]


def test_when_one_of_two_processes_is_killed_the_whole_run_ends_with_a_sentence(tmp_path: Path, rows: Path) -> None:
    output = tmp_path / "out"
    config = write_config(tmp_path / "run.yaml", rows, output, steps=10_000, save_every=1, parallel={"dp": 2})
    process = start("runtime.cli", "train", config)
    try:
        assert eventually(lambda: bool(checkpoints(output / "checkpoints")) or process.poll() is not None, 120)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        said = finish(process, 60)
    finally:
        process.kill()
    assert said.status == 1 and "Traceback" not in said.err
    assert "graft train: process 1 was ended by signal 9 (Killed); --resume goes on from the newest checkpoint" in (
        said.messages
    )
    assert len(said.messages) <= 2, said.messages
    assert all(path.name.startswith("step-") for path in checkpoints(output / "checkpoints"))
