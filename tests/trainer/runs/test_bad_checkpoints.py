"""A checkpoint that is damaged, of another run or not there is refused with a sentence that names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.cli import main
from runtime.trainer.checkpoint import CheckpointProblem, RunState
from runtime.trainer.config import ModuleLora
from runtime.trainer.config_file import as_plain, read_config
from runtime.trainer.resume import check_same_run
from tests.trainer.runs.demo import MODEL, Graft, write_config, write_rows

NEWEST = "step-00000006"
OFFER = "move it away, and --resume goes on from step-00000004"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """A folder with run.yaml and its output `out`."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["train", str(write_config(folder / "run.yaml", rows, folder / "out"))]) == 0
    return folder


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path, rows: Path) -> Path:
    """The newest checkpoint of a copy of the run in `tmp_path`."""
    shutil.copytree(finished / "out", tmp_path / "out")
    write_config(tmp_path / "run.yaml", rows, tmp_path / "out")
    return tmp_path / "out" / "checkpoints" / NEWEST


def tensors_file(path: Path) -> Path:
    return next(path.glob("*.distcp"))


def truncate(path: Path) -> None:
    file = tensors_file(path)
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_byte(path: Path) -> None:
    content = bytearray(tensors_file(path).read_bytes())
    content[len(content) // 2] ^= 1
    tensors_file(path).write_bytes(bytes(content))


def change_the_step(path: Path) -> None:
    text = (path / "run.json").read_text()
    (path / "run.json").write_text(text.replace('"step": 6', '"step": 5'))


def list_nothing(path: Path) -> None:
    (path / "files.json").write_text("{}")


def unlist_the_tensors(path: Path) -> None:
    files = json.loads((path / "files.json").read_text())
    del files[".metadata"]
    (path / "files.json").write_text(json.dumps(files))


def garbage(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text('{"a": [1, ') and None


def without(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated tensors": (truncate, "__0_0.distcp is not what was written"),
    "a flipped byte": (flip_a_byte, "__0_0.distcp is not what was written"),
    "another step": (change_the_step, "run.json is not what was written"),
    "garbage in run.json": (garbage("run.json"), "run.json is not what was written"),
    "no run.json": (without("run.json"), "run.json is missing"),
    "no metadata": (without(".metadata"), ".metadata is missing"),
    "no tensors": (lambda path: tensors_file(path).unlink(), "__0_0.distcp is missing"),
    "garbage in files.json": (garbage("files.json"), "files.json is missing or damaged"),
    "an empty list": (list_nothing, "files.json does not list .metadata"),
    "a short list": (unlist_the_tensors, "files.json does not list .metadata"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_another_one_is_offered(
    graft: Graft, checkpoint: Path, tmp_path: Path, name: str
) -> None:
    damage, reason = DAMAGES[name]
    damage(checkpoint)
    said = graft("train", tmp_path / "run.yaml", "--resume")
    expected = f"graft train: {checkpoint} is not a whole checkpoint: {reason}; {OFFER}"
    assert (said.status, said.messages) == (1, [expected])
    assert "Traceback" not in said.err


def test_the_offered_checkpoint_can_be_resumed_from(graft: Graft, checkpoint: Path, tmp_path: Path) -> None:
    truncate(checkpoint)
    checkpoint.rename(tmp_path / "away")
    assert graft("train", tmp_path / "run.yaml", "--resume").status == 0
    assert checkpoint.is_dir()


def test_of_a_damaged_checkpoint_before_others_the_others_are_offered(
    graft: Graft, checkpoint: Path, tmp_path: Path
) -> None:
    truncate(checkpoint.with_name("step-00000004"))
    said = graft("train", tmp_path / "run.yaml", "--resume", "step-00000004")
    assert said.status == 1 and said.messages[0].endswith("; resume from another one (step-00000006)")


def test_a_checkpoint_without_its_list_of_files_is_none(graft: Graft, checkpoint: Path, tmp_path: Path) -> None:
    """That file is written last, so without it nothing is promised; the one before is taken."""
    (checkpoint / "files.json").unlink()
    said = graft("train", tmp_path / "run.yaml", "--resume", NEWEST)
    assert said.status == 1 and "files.json is missing or damaged" in said.err
    assert graft("train", tmp_path / "run.yaml", "--resume").status == 0


@pytest.mark.parametrize("resume", ["step-00000003", "/nowhere/step-00000006", "..", ""])
def test_a_checkpoint_that_is_not_there_is_named(graft: Graft, checkpoint: Path, tmp_path: Path, resume: str) -> None:
    said = graft("train", tmp_path / "run.yaml", "--resume", resume)
    assert said.status == 1 and len(said.messages) == 1, said.err
    assert f"{checkpoint.parent / resume}" in said.err or resume in said.err


CHANGES: dict[str, tuple[list[str], list[str]]] = {
    "rank": (["lora.rank=8"], ["lora.rank was 4, is 8"]),
    "seed": (["seed=7"], ["seed was 0, is 7"]),
    "lr": (["optimizer.lr=1e-3"], ["optimizer.lr was 0.0002, is 0.001"]),
    "steps": (["steps=9"], ["steps was 6, is 9"]),
    "dropout, dtype": (["lora.dropout=0.5", "dtype=bfloat16"], ["lora.dropout was 0.0, is 0.5", "dtype was 'float32'"]),
    "selection": (["selection.threshold=0.3"], ["selection was None, is {'by': 'gate_score', 'threshold': 0.3"]),
    "targets": (["lora.targets=[experts, o_proj]"], ["lora.targets was ['o_proj'], is ['experts', 'o_proj']"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused_by_name(graft: Graft, checkpoint: Path, tmp_path: Path, name: str) -> None:
    changes, named = CHANGES[name]
    said = graft("train", tmp_path / "run.yaml", "--resume", *[f"--set={change}" for change in changes])
    assert said.status == 1 and len(said.messages) == 1, said.err
    assert said.messages[0].startswith("graft train: the run cannot go on with other settings: ")
    assert all(words in said.messages[0] for words in named), said.messages


def test_patterns_in_another_order_are_other_settings(tmp_path: Path, rows: Path) -> None:
    """The first that fits a module decides, so their order changes ranks and scales."""
    patterns = {"o_proj": ModuleLora(4, 4.0), "layers.1": ModuleLora(4, 64.0)}
    before = read_config(write_config(tmp_path / "run.yaml", rows, tmp_path / "out"))
    before = replace(before, lora=replace(before.lora, patterns=patterns))
    now = replace(before, lora=replace(before.lora, patterns=dict(reversed(patterns.items()))))
    kept = RunState(1, json.loads(json.dumps(as_plain(before))), None, {}, {})
    check_same_run(before, kept)
    with pytest.raises(CheckpointProblem, match=r"lora.patterns was \{'o_proj'.*, is \{'layers.1'.*set them back"):
        check_same_run(now, kept)


def test_settings_that_change_no_number_may_change(graft: Graft, checkpoint: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "out", moved)
    changes = [f"output={moved}", "micro_batch_rows=2", "save_every=3", "keep_checkpoints=5", "log_every=2"]
    changes.append("export_dtype=bfloat16")
    said = graft("train", tmp_path / "run.yaml", "--resume", *[f"--set={change}" for change in changes])
    assert said.status == 0, said.err


def test_other_data_under_the_same_name_is_refused(graft: Graft, checkpoint: Path, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "rows.jsonl")
    write_config(tmp_path / "own.yaml", own, tmp_path / "own")
    assert graft("train", tmp_path / "own.yaml").status == 0
    write_rows(own, 39)
    said = graft("train", tmp_path / "own.yaml", "--resume")
    assert said.status == 1 and said.messages == [
        f"graft train: the run cannot go on: data.train ({own}) is not what it was trained with; put that back, or "
        "start a new run in another output"
    ]


def test_the_same_base_elsewhere_is_taken(graft: Graft, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "base")
    assert graft("train", tmp_path / "run.yaml", "--resume", "--set", f"model={tmp_path / 'base'}").status == 0


@pytest.mark.parametrize(
    "changed",
    [
        "model.layers.2.input_layernorm.weight",
        "model.layers.3.self_attn.q_b_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.2.mlp.experts.5.down_proj.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_base_with_another_weight_is_refused(graft: Graft, checkpoint: Path, tmp_path: Path, changed: str) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(MODEL, base)
    tensors = load_file(base / "model.safetensors")
    tensors[changed] *= 1.5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    said = graft("train", tmp_path / "run.yaml", "--resume", "--set", f"model={base}")
    assert said.status == 1
    assert [line for line in said.messages if f"model ({base}) is not what it was trained with" in line]


def test_resuming_without_any_checkpoint_is_refused(graft: Graft, tmp_path: Path, rows: Path) -> None:
    said = graft("train", write_config(tmp_path / "run.yaml", rows, tmp_path / "out"), "--resume")
    expected = f"graft train: {tmp_path}/out/checkpoints holds no whole checkpoint to resume from"
    assert said.status == 1 and said.messages[0].startswith(expected)


def test_a_fresh_start_over_checkpoints_is_refused(graft: Graft, checkpoint: Path, tmp_path: Path) -> None:
    said = graft("train", tmp_path / "run.yaml")
    assert (said.status, len(said.messages)) == (1, 1)
    expected = "holds checkpoints of an earlier run (up to step-00000006): go on with --resume, choose another output"
    assert expected in said.messages[0]
    assert checkpoint.is_dir()
