"""An output that holds the result of an earlier run: nothing of it is replaced unless that is asked for."""

from __future__ import annotations

from pathlib import Path

from tests.trainer.runs.demo import Graft, adapter_bytes, log_lines, losses, write_config


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_the_adapter_of_a_run_without_checkpoints_is_not_replaced(graft: Graft, tmp_path: Path, rows: Path) -> None:
    output = tmp_path / "out"
    config = write_config(tmp_path / "run.yaml", rows, output, save_every=0, steps=2)
    assert graft("train", config).status == 0
    before = contents(output)
    said = graft("train", config, "--set", "seed=1")
    assert said.status == 1 and said.messages == [
        f"graft train: {output} holds the result of an earlier run (adapter, adapter-best): choose another output, or "
        "give --overwrite to replace that run"
    ]
    assert contents(output) == before


def test_overwrite_replaces_all_of_the_run_but_its_log(graft: Graft, tmp_path: Path, rows: Path) -> None:
    output = tmp_path / "out"
    config = write_config(tmp_path / "run.yaml", rows, output, steps=4)
    assert graft("train", config).status == 0
    logs = [losses(output)]
    changes = ["--set=data.eval_fraction=0", "--set=save_every=0", "--set=steps=2"]
    for seed in (1, 2):
        assert graft("train", config, "--overwrite", f"--set=seed={seed}", *changes).status == 0
        logs.append(losses(output))
    fresh = tmp_path / "fresh"
    assert graft("train", config, "--set=seed=2", f"--set=output={fresh}", *changes).status == 0
    assert adapter_bytes(output) == adapter_bytes(fresh) and losses(output) == losses(fresh)
    assert not (output / "adapter-best").exists() and not (output / "checkpoints").exists()
    kept = [(output / name).read_text().count('"kind": "step"') for name in
            ("log.previous.jsonl", "log.previous-2.jsonl")]  # fmt: skip
    assert kept == [len(logs[0]), len(logs[1])] == [4, 2], "each run's log is there"
    assert len(log_lines(output, "step")) == 2


def test_a_run_that_cannot_begin_takes_nothing_away(graft: Graft, tmp_path: Path, rows: Path) -> None:
    output = tmp_path / "out"
    config = write_config(tmp_path / "run.yaml", rows, output, steps=2)
    assert graft("train", config).status == 0
    before = contents(output)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    assert graft("train", config, "--overwrite", f"--set=data.train=[{bad}]").status == 1
    assert contents(output) == before


def test_a_run_that_goes_on_elsewhere_does_not_replace_the_result_there(
    graft: Graft, tmp_path: Path, rows: Path
) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    config = write_config(tmp_path / "run.yaml", rows, first, steps=2)
    assert graft("train", config).status == 0
    assert graft("train", config, f"--set=output={other}", "--set=save_every=0", "--set=seed=4").status == 0
    before = contents(other)
    newest = first / "checkpoints" / "step-00000002"
    said = graft("train", config, f"--set=output={other}", "--resume", newest)
    assert said.status == 1 and "holds the result of another run (adapter, adapter-best), which this" in said.err
    assert contents(other) == before
