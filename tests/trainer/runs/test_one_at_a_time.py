"""One run at a time writes into an output folder, and none of its processes outlives the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from runtime.trainer.output import LOCK, OutputLock
from tests.server.live import eventually
from tests.trainer.runs.demo import REPOSITORY, Graft, finish, losses, start, write_config


def test_a_second_run_with_the_same_output_is_refused_with_the_name_of_the_first(
    graft: Graft, tmp_path: Path, rows: Path
) -> None:
    output, config = tmp_path / "out", tmp_path / "run.yaml"
    write_config(config, rows, output, steps=10_000)
    process = start("runtime.trainer", config)
    try:
        assert eventually(lambda: (output / "log.jsonl").exists() or process.poll() is not None, 120)
        said = graft("train", config)
    finally:
        process.kill()
        finish(process)
    assert said.status == 1 and len(said.messages) == 1, said.err
    expected = f"graft train: output = '{output}': another run writes there (process {process.pid} on "
    assert said.messages[0].startswith(expected)
    assert said.messages[0].endswith("): wait for its end, or choose another output")


def test_the_output_is_free_after_a_run_that_ended_and_after_one_that_was_refused(
    graft: Graft, tmp_path: Path, rows: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out")
    assert graft("train", config, "--set", "lora.targets=[flux_capacitor]").status == 1
    assert graft("train", config, "--set", "steps=1").status == 0
    assert (tmp_path / "out" / LOCK).read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
    OutputLock(tmp_path / "out").release()


def test_when_the_command_is_killed_the_processes_that_it_started_end_too(tmp_path: Path, rows: Path) -> None:
    output = tmp_path / "out"
    config = write_config(tmp_path / "run.yaml", rows, output, steps=10_000, save_every=0, parallel={"dp": 2})
    process = start("runtime.cli", "train", config)
    children: list[int] = []
    try:
        started = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        assert eventually(lambda: (output / "log.jsonl").exists() and bool(losses(output)), 120)
        children = [int(child) for child in started.read_text().split()]
        assert len(children) == 2
        process.kill()
        assert eventually(lambda: not any(_is_running(child) for child in children), 20)
    finally:
        process.kill()
        for child in children:
            if _is_running(child):
                os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_process_whose_parent_had_ended_before_it_was_ready_ends_at_once() -> None:
    code = "from runtime.distributed.parent import end_with_parent; end_with_parent({}); print('goes on')"
    said = []
    for parent in (os.getpid(), os.getpid() + 1):
        command = [sys.executable, "-c", code.format(parent)]
        said.append(subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=30))
    assert [(one.returncode, one.stdout) for one in said] == [(0, "goes on\n"), (1, "")]
    assert said[1].stderr == f"graft train: process {os.getpid() + 1}, which started this one, has ended\n"


def _is_running(pid: int) -> bool:
    """A killed process that nobody has waited for is none any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
