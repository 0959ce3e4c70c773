"""What goes wrong in one of several processes is found, told and ends nothing that need not end; and going on in
another layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.distributed.mesh import make_mesh
from runtime.trainer.checkpoint import check_files, checkpoints
from runtime.trainer.config_file import from_plain
from runtime.trainer.stage import mesh_shape
from tests.conftest import RecordNumber
from tests.trainer.parallel import faults
from tests.trainer.parallel.base import OPTIONS, build_base, plain_config
from tests.trainer.parallel.launch import logs, run_job
from tests.trainer.parallel.worker import Run, carry_out

DP2: dict[str, Any] = {"dp": 2}
TP2_DP2: dict[str, Any] = {"tp": 2, "dp": 2}
# Where each part of the interrupted runs ends, and in which layout it ran.
PARTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {}),
    (4, {"tp": 2, "pp": 2}),
    (6, {"dp": 2, "ep": 2}),
    (8, {}),
)


@dataclass(frozen=True)
class Outcome:
    """Everything that the jobs left in `folder`."""

    folder: Path

    def errors(self, name: str) -> list[str]:
        """What each process said, by rank."""
        return [path.read_text() for path in sorted(self.folder.glob(f"{name}.pt.error.*"))]

    def result(self, name: str) -> dict[str, Any]:
        return torch.load(self.folder / f"{name}.pt")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("faults")
    build_base(folder / "base")

    def run(name: str, layout: dict[str, Any], output: str | None = None, **changes: Any) -> Run:
        config = plain_config(folder / "base", folder / (output or name), steps=8, save_every=2, parallel=layout)
        own = {key: changes.pop(key) for key in list(changes) if key in ("resume", "stop_after", "fault", "fails")}
        return Run(config | changes, str(folder / f"{name}.pt"), **own)

    def part(number: int) -> Run:
        stop, layout = PARTS[number]
        resume = "latest" if number else None
        return run(f"part {number}", layout, "parts", resume=resume, stop_after=stop, **OPTIONS)

    _run_here(run("unbroken", {}, **OPTIONS))
    _run_here(part(0))
    four = [run("no broadcast TP2xDP2", TP2_DP2, fault=faults.NO_BROADCAST, fails=True)]
    _run([*four, part(1)], 4, folder / "jobs-4")
    two = [
        run("no broadcast DP2", DP2, fault=faults.NO_BROADCAST, fails=True),
        run("no output", DP2, "/proc/out", fails=True),
        run("unshared", DP2, fault=faults.UNSHARED, fails=True),
        run("linear", DP2, fault=faults.CHANGED_LINEAR, fails=True),
        run("expert", DP2, fault=faults.CHANGED_EXPERT, fails=True),
        run("disk full", DP2, fault=faults.DISK_FULL, stop_after=4),
        run("disk full on one", DP2, fault=faults.DISK_FULL_ON_ONE, stop_after=4),
    ]
    _run([*two, part(2)], 2, folder / "jobs-2")
    _run_here(part(3))
    return Outcome(folder)


def _run_here(run: Run) -> None:
    carry_out(run, make_mesh(mesh_shape(from_plain(run.config, "test").parallel)))


def _run(runs: list[Run], num_processes: int, folder: Path) -> None:
    statuses = run_job(runs, num_processes, folder)
    said = [path.read_text() for path in folder.parent.glob("*.error.*")]
    assert statuses == [0] * num_processes, logs(folder) + "\n".join(said)


@pytest.mark.parametrize(("name", "num_processes"), [("no broadcast DP2", 2), ("no broadcast TP2xDP2", 4)])
def test_without_the_broadcast_the_checksum_stops_the_run_before_its_first_step(
    outcome: Outcome, name: str, num_processes: int
) -> None:
    errors = outcome.errors(name)
    assert len(errors) == num_processes and len(set(errors)) == 1
    assert errors[0].startswith("ReplicasDiffer: step 0: replicas of the adapter differ, the run is stopped: ")
    assert "lora_A on process 1" in errors[0] and "differs from process 0" in errors[0]
    assert not outcome.folder.joinpath(name, "log.jsonl").exists()


def test_all_processes_that_lack_a_replicated_factor_are_named(outcome: Outcome) -> None:
    assert "lora_A on process 1, 2, 3 differs from process 0" in outcome.errors("no broadcast TP2xDP2")[0]


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("linear", "model.layers.0.self_attn.q_a_proj.lora_A"),
        ("expert", "model.layers.1.mlp.experts.gate_up_proj.lora_A"),
    ],
)
def test_a_factor_that_changes_on_one_process_is_found_and_named_at_the_next_check(
    outcome: Outcome, name: str, factor: str
) -> None:
    said = f"{factor} on process 1 differs from process 0"
    errors = outcome.errors(name)
    assert len(errors) == 2 and len(set(errors)) == 1
    assert errors[0].startswith("ReplicasDiffer: step 4: ") and said in errors[0]
    assert not outcome.folder.joinpath(f"{name}.pt").exists()


def test_what_only_one_process_met_ends_all_and_is_told_with_its_number(outcome: Outcome) -> None:
    """Process 0 alone writes, so it alone finds that the output cannot be written."""
    own, other = outcome.errors("no output")
    said = "output = '/proc/out': cannot be written (No such file or directory): choose another output"
    assert (own, other) == (f"MetByAll: {said}", f"MetByAll: process 0: {said}")


def test_an_output_that_one_process_does_not_see_is_refused_before_the_base_is_read(outcome: Outcome) -> None:
    output = outcome.folder / "unshared"
    for rank, error in enumerate(outcome.errors("unshared")):
        own = f"{output}-elsewhere" if rank else output
        assert error == (
            f"MetByAll: output = '{own}': process 1 cannot see what process 0 writes there: choose a folder that all "
            "hosts of the run share, by the same path"
        )
    assert [path.name for path in output.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["disk full", "disk full on one"])
def test_a_checkpoint_that_one_process_cannot_write_is_told_and_the_next_one_is_whole(
    outcome: Outcome, name: str
) -> None:
    folder = outcome.folder / name / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000004"], "neither step 2 nor a part of it is there"
    check_files(folder / "step-00000004")
    assert outcome.errors(name) == []
    told = logs(outcome.folder / "jobs-2")
    said = f"{folder}/step-00000002: the checkpoint cannot be written (File too large); training goes on"
    assert told.count(said) == 1


def test_a_disk_that_was_full_changes_no_number(outcome: Outcome) -> None:
    losses = outcome.result("disk full")["losses"]
    assert len(losses) == 4 and losses == outcome.result("disk full on one")["losses"]


def test_a_run_that_goes_on_in_other_layouts_has_the_losses_of_an_unbroken_one(
    outcome: Outcome, record_number: RecordNumber
) -> None:
    """With every option that draws numbers or keeps a state, experts chosen in the first part among them."""
    unbroken = outcome.result("unbroken")
    parts = [outcome.result(f"part {number}") for number in range(len(PARTS))]
    losses = [loss for part in parts for loss in part["losses"]]
    pairs = list(zip(losses, unbroken["losses"], strict=True))
    record_number("1 > TP2xPP2 > EP2 > 1: loss, relative", max(abs(a / b - 1) for a, b in pairs), at_most=1e-5)
    adapters = parts[-1]["adapter"], unbroken["adapter"]
    assert adapters[0].keys() == adapters[1].keys()
    worst = max(float((adapters[0][key] - adapters[1][key]).abs().max()) for key in adapters[1])
    record_number("1 > TP2xPP2 > EP2 > 1: adapter, absolute", worst, at_most=1e-5)


def test_only_the_newest_checkpoints_are_kept_whatever_layout_wrote_them(outcome: Outcome) -> None:
    kept = checkpoints(outcome.folder / "parts" / "checkpoints")
    assert [path.name for path in kept] == ["step-00000006", "step-00000008"]
