"""What cannot be run is refused before anything is trained: no traceback, one message that says what to change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from runtime.distributed.mesh import MetByAll
from runtime.trainer.__main__ import train
from runtime.trainer.config_file import ConfigError
from tests.trainer.runs.demo import MODEL, Graft, Said, finish, start, write_config


def check_one_message(said: Said, *words: str) -> None:
    assert said.status == 1, said.err
    assert len(said.messages) == 1, said.err
    assert "Traceback" not in said.err and "Traceback" not in said.out
    for word in words:
        assert word in said.err, said.err


# --set arguments, and what the message must name.
SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "an unknown key": (["lora.rnk=8"], ["lora.rnk is not a setting, did you mean rank?"]),
    "a wrong type": (["steps=many"], ["steps = 'many' must be a whole number"]),
    "two problems at once": (["steps=many", "seed=x"], ["steps = 'many'", "seed = 'x'"]),
    "a value out of range": (["lora.rank=1000"], ["lora.rank = 1000 is not allowed: 0..512"]),
    "no key": (["=5"], ["expected KEY=VALUE"]),
    "a key below a value": (["steps.x=5"], ["steps is not a group of keys"]),
    "steps and epochs": (["epochs=1"], ["steps, epochs", "exactly one of the two"]),
    "a number beyond all": (["optimizer.lr=1" + 400 * "0"], ["optimizer.lr is a number of 401 digits, which is too"]),
    "nan": (["optimizer.lr=.nan"], ["optimizer.lr = nan is not allowed: above 0"]),
    "a model that is not there": (["model=/nowhere"], ["model = '/nowhere'", "an existing folder"]),
    "data that is not there": (["data.train=[/nowhere.jsonl]"], ["data.train = '/nowhere.jsonl'"]),
    "an unknown device": (["device=tpu"], ["device = 'tpu' is not allowed: one of cpu, cuda, npu"]),
    "an unknown target": (["lora.targets=[flux_capacitor]"], ["flux_capacitor"]),
    "nothing to train": (["lora.rank=0"], ["lora"]),
    "tp that does not divide the heads": (["parallel.tp=4"], ["parallel.tp = 4 does not divide", "6 attention heads"]),
    "tp that does not divide the experts": (["parallel.tp=3"], ["parallel.tp = 3 does not divide", "vocabulary"]),
    "ep that does not divide the mesh": (["parallel.ep=3"], ["parallel.ep = 3", "divides dp x tp"]),
    "more stages than layers": (["parallel.pp=5", "batch_rows=5"], ["5", "4 layers"]),
    "layers that do not add up": (["parallel.pp=2", "parallel.layers=[1, 2]"], ["4"]),
    "rows that do not divide": (["parallel.dp=2", "batch_rows=3"], ["batch_rows = 3", "micro_batch_rows x dp (2)"]),
    "stages without work": (["parallel.pp=4", "batch_rows=2"], ["batch_rows = 2", "so that every pipeline stage has"]),
    "rows longer than positions": (["data.max_length=1000000"], ["beyond the base's 163840 positions"]),
    "a warm-up beyond the steps": (["optimizer.warmup_steps=7"], ["optimizer.warmup_steps = 7", "run's steps (6)"]),
    "a warm-up beyond the epochs": (
        ["steps=null", "epochs=1", "optimizer.warmup_steps=999"], ["warmup_steps = 999", "at most the run's steps"]
    ),
    "a pattern for what is not trained": (["lora.patterns.q_b_proj.rank=8"], ["'q_b_proj'", "add the module to lora."]),
    "a key that is set twice": (["optimizer={lr: 1, lr: 2}"], ["--set", "lr is set twice, in line 1: remove one"]),
    "selection without experts": (["lora.targets=[o_proj]", "selection.threshold=0.5"], ["selection", "add experts"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be_used_are_named(graft: Graft, tmp_path: Path, rows: Path, name: str) -> None:
    """Through --dry-run where several processes would be started: it reads the base and refuses what they would."""
    changes, words = SETTINGS[name]
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out")
    several = any(change.startswith("parallel.") for change in changes)
    for flags in (["--dry-run"],) if several else ([], ["--dry-run"]):
        said = graft("train", config, *flags, *[f"--set={change}" for change in changes])
        check_one_message(said, *words)
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [1", "cannot be read as YAML"),
        ("just a text", "expected keys and values at the top"),
        ("", "expected keys and values at the top"),
        ("\0\1", "cannot be read as YAML"),
        ("steps: 1\nlora:\n  rank: 4\n  alpha: 8\n  rank: 8\n", ": rank is set twice, in lines 3 and 5: remove one"),
        ("steps: 1\nseed: 2\n\nsteps: 2\n", ": steps is set twice, in lines 1 and 4: remove one of them"),
        ("a: &x {rank: 4}\nsteps: 1\nlora: {<<: *x, rank: 8}\n", "a is not a setting"),
        ("steps: 5", "model is missing; output is missing; data is missing"),
        ("model: x\noutput: y\ndata: {train: []}\nsteps: 1", "model = 'x' is not allowed"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(graft: Graft, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    check_one_message(graft("train", path), str(path), words)


def test_a_configuration_that_is_not_there_is_named(graft: Graft, tmp_path: Path) -> None:
    check_one_message(graft("train", tmp_path / "none.yaml"), f"{tmp_path}/none.yaml: cannot be read", "No such file")
    check_one_message(graft("train", tmp_path), f"{tmp_path}: cannot be read", "Is a directory")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n', ":1: "),
        ('{"prompt": "a", "completion": "b"}\nnot json\n', ":2: "),
        ('{"prompt": "a", "completion": 5}\n', ":1: "),
        ("[1]\n", ":1: "),
        ("", "no rows"),
        ("\n\n", "no rows"),
    ],
)
def test_rows_that_cannot_be_used_are_named_by_line(graft: Graft, tmp_path: Path, text: str, words: str) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text(text)
    check_one_message(graft("train", write_config(tmp_path / "run.yaml", data, tmp_path / "out")), str(data), words)


def remove(name: str) -> Callable[[Path], None]:
    return lambda base: (base / name).unlink()


def set_config(**changes: object) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def truncate_weights(base: Path) -> None:
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[:-1000])


def drop_a_tensor(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.7.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def write_garbage(name: str) -> Callable[[Path], None]:
    return lambda base: (base / name).write_text('{"a": ') and None


BASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config.json": (remove("config.json"), ["config.json"]),
    "garbage in config.json": (write_garbage("config.json"), ["config.json"]),
    "another architecture": (set_config(model_type="llama", architectures=["LlamaForCausalLM"]), ["llama"]),
    "another size": (set_config(hidden_size=128), ["192", "128"]),
    "more layers than weights": (set_config(num_hidden_layers=5), ["model.layers.4."]),
    "no tokenizer": (remove("tokenizer.json"), ["tokenizer.json"]),
    "garbage in the tokenizer": (write_garbage("tokenizer.json"), ["the tokenizer cannot be loaded"]),
    "no weights": (remove("model.safetensors"), ["safetensors"]),
    "truncated weights": (truncate_weights, ["model.safetensors"]),
    "a missing tensor": (drop_a_tensor, ["model.layers.2.mlp.experts.7.up_proj.weight"]),
}


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_bad_row_of_an_evaluation_file_is_told_as_that(
    graft: Graft, tmp_path: Path, rows: Path, flags: list[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 7}\n')
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out")
    changes = [f"--set=data.eval=[{bad}]", "--set=data.eval_fraction=0"]
    said = graft("train", config, *changes, *flags)
    check_one_message(said, "1 row of the evaluation data cannot be used", f"{bad}:1: ")


@pytest.mark.parametrize("name", BASES)
def test_a_base_that_cannot_be_used_is_named(graft: Graft, tmp_path: Path, rows: Path, name: str) -> None:
    damage, words = BASES[name]
    base = tmp_path / "base"
    shutil.copytree(MODEL, base)
    damage(base)
    said = graft("train", write_config(tmp_path / "run.yaml", rows, tmp_path / "out", model=str(base)))
    check_one_message(said, str(base), *words)


def test_an_output_that_cannot_be_written_is_refused_before_the_base_is_read(
    graft: Graft, tmp_path: Path, rows: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", rows, Path("/proc/out"))
    check_one_message(graft("train", config), "output = '/proc/out': cannot be written", "choose another output")
    config = write_config(tmp_path / "run.yaml", rows, rows / "out")
    check_one_message(graft("train", config), f"output = '{rows}/out': cannot be written (Not a directory)")


def test_an_adapter_folder_with_other_files_is_refused_before_training(
    graft: Graft, tmp_path: Path, rows: Path
) -> None:
    notes = tmp_path / "out" / "adapter" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    said = graft("train", write_config(tmp_path / "run.yaml", rows, tmp_path / "out"))
    check_one_message(said, "notes.txt, which would be lost")
    assert notes.read_text() == "mine" and not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has what the test needs to lack")
def test_a_device_that_is_not_there_is_named(graft: Graft, tmp_path: Path, rows: Path) -> None:
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out")
    check_one_message(graft("train", config, "--set", "device=cuda"), "device = 'cuda'", "no CUDA device")


def test_publishing_needs_an_address_and_a_name(graft: Graft, tmp_path: Path, rows: Path) -> None:
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out")
    for flags in (["--publish", "127.0.0.1:1"], ["--name", "mine"]):
        check_one_message(graft("train", config, *flags), "--publish HOST:PORT and --name NAME go together")
    flags = ["--publish", "127.0.0.1:1", "--name", "mine", "--dry-run"]
    check_one_message(graft("train", config, *flags), "--dry-run trains nothing that --publish could load")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "3"}, ["3 processes were started, but pp x dp x tp = 1 x 2 x 2 needs 4"]),
        ({}, ["1 process was started, but pp x dp x tp = 1 x 2 x 2 needs 4"]),
        ({"RANK": "x", "WORLD_SIZE": "4"}, ["RANK = 'x' is no number"]),
        ({"RANK": "4", "WORLD_SIZE": "4"}, ["RANK = 4, WORLD_SIZE = 4"]),
        ({"RANK": "0", "WORLD_SIZE": "4"}, ["MASTER_ADDR"]),
    ],
)
def test_a_wrong_number_of_processes_is_refused_without_waiting_for_them(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rows: Path,
    environment: dict[str, str],
    words: list[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out", parallel={"tp": 2, "dp": 2}, batch_rows=4)
    status = train(config, [], None)
    check_one_message(Said(status, *capfd.readouterr()), *words)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MetByAll("all met this"), ""),
        (ConfigError("all met this"), ""),
        (ValueError("only here"), "graft train (process 3): only here\n"),
        (OSError("only here"), "graft train (process 3): only here\n"),
    ],
)
def test_what_only_a_later_process_of_a_host_met_is_told_by_it_and_what_all_met_is_not(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: Path,
    error: Exception, told: str,
) -> None:  # fmt: skip
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out")
    with mock.patch("runtime.trainer.__main__._train", side_effect=error):
        assert train(config, [], None) == 1
    assert capfd.readouterr().err == told


def test_more_processes_than_devices_are_refused(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: Path
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    changes = {"parallel": {"dp": 4}, "batch_rows": 4, "device": "cuda"}
    status = train(write_config(tmp_path / "run.yaml", rows, tmp_path / "out", **changes), [], None)
    said = Said(status, *capfd.readouterr())
    check_one_message(said, "4 processes were started on this host, which has 2 of device = 'cuda'", "start fewer here")


CUDA_FULL = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 12.50 MiB is "
    "free. Including non-PyTorch memory, this process has 79.09 GiB memory in use."
)


def run_out_of_memory() -> None:
    torch.empty(2**50, dtype=torch.int8)


def run_out_of_device_memory() -> None:
    raise torch.OutOfMemoryError(CUDA_FULL)


def run_out_in_a_pipeline() -> None:
    raise RuntimeError("[Stage 0] failed to run forward") from torch.OutOfMemoryError(CUDA_FULL)


@pytest.mark.parametrize(
    ("work", "amount"),
    [
        (run_out_of_memory, "(1,048,576.00 GiB more were asked for)"),
        (run_out_of_device_memory, "(20.00 MiB more were asked for, the device has 79.11 GiB)"),
        (run_out_in_a_pipeline, "(20.00 MiB more were asked for, the device has 79.11 GiB)"),
    ],
)
def test_memory_that_is_not_there_is_one_sentence(
    graft: Graft, tmp_path: Path, rows: Path, work: Callable[[], None], amount: str
) -> None:
    with mock.patch("runtime.trainer.loop.gradients_of", return_value=lambda micro_batches: work()):
        said = graft("train", write_config(tmp_path / "run.yaml", rows, tmp_path / "out"))
    check_one_message(said, f"graft train: out of memory {amount}: lower micro_batch_rows", "activation_checkpointing")


def test_the_command_as_a_process_of_its_own_ends_with_one_line(tmp_path: Path, rows: Path) -> None:
    path = write_config(tmp_path / "run.yaml", rows, tmp_path / "out")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"stepz": 3}))
    said = finish(start("runtime.cli", "train", path))
    assert said.status == 1 and said.out == ""
    assert said.err == f"graft: {path}: stepz is not a setting, did you mean steps?\n"


def test_of_several_processes_one_tells_what_all_met(tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 7}\n')
    config = write_config(tmp_path / "run.yaml", data, tmp_path / "out", parallel={"dp": 2})
    check_one_message(finish(start("runtime.cli", "train", config)), f"{data}:2: ")
