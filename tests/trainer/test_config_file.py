"""Training configurations: what YAML may hold, what is refused and how it is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.trainer.config import (
    DataConfig,
    LoraSettings,
    ModuleLora,
    OptimizerConfig,
    ParallelConfig,
    RoutingConfig,
    SelectionConfig,
    TrainConfig,
)
from runtime.trainer.config_file import MAX_CONFIG_BYTES, ConfigError, as_plain, from_plain, read_config

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration of the fewest keys, with others on top (`None`: without it); returns its path."""
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    least: dict[str, Any] = {
        "model": str(tmp_path / "base"),
        "output": str(tmp_path / "out"),
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "steps": 3,
    }

    def to_file(text: str | None = None, **keys: Any) -> Path:
        path = tmp_path / "config.yaml"
        merged = {key: value for key, value in (least | keys).items() if value is not None}
        merged["data"] = least["data"] | keys.get("data", {})
        path.write_text(yaml.safe_dump(merged) + (text or ""), encoding="utf-8")
        return path

    return to_file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        read_config(path, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_fewest_keys_give_the_documented_defaults(write: Write, tmp_path: Path) -> None:
    config = read_config(write())
    data = DataConfig((tmp_path / "rows.jsonl",))
    assert config == TrainConfig(tmp_path / "base", tmp_path / "out", data, steps=3)
    assert (config.lora.targets, config.lora.rank, config.lora.alpha) == (("experts",), 16, None)


def test_every_key_arrives_in_its_type(write: Write, tmp_path: Path) -> None:
    text = """
lora: {targets: [experts, o_proj], rank: 8, alpha: 16, rslora: true, dropout: 5e-2, dropout_seed: 3, init: xavier,
       patterns: {o_proj: {rank: 4, alpha: 2}, experts: {rank: 0}}}
selection: {by: token_share, threshold: 1, sample_rows: 9}
routing: {aux_loss: 1e-3, capacity_factor: 1.25, overflow: reroute}
parallel: {tp: 2, pp: 2, dp: 2, ep: 4, layers: [1, 2]}
optimizer: {lr: 1e-4, schedule: linear, warmup_steps: 2, lora_plus_ratio: 16, clip_norm: null, beta2: 0.95}
batch_rows: 8
micro_batch_rows: 2
seed: 7
dtype: float32
activation_checkpointing: true
"""
    config = read_config(write(text, steps=None, epochs=2))
    patterns = {"o_proj": ModuleLora(4, 2.0), "experts": ModuleLora(0)}
    assert config.lora == LoraSettings(("experts", "o_proj"), 8, 16.0, patterns, True, 0.05, 3, "xavier")
    assert config.selection == SelectionConfig("token_share", 1.0, 9)
    assert config.routing == RoutingConfig(1e-3, 1.25, "reroute")
    assert config.parallel == ParallelConfig(2, 2, 2, 4, (1, 2))
    assert (config.parallel.num_processes, config.parallel.expert_size, config.num_micro_batches) == (8, 4, 2)
    rate = OptimizerConfig(1e-4, 0.1, "linear", 2, 16.0, beta2=0.95, clip_norm=None)
    assert config.optimizer == rate
    for value, kind in ((config.lora.alpha, float), (config.selection.threshold, float), (config.epochs, float)):
        assert type(value) is kind
    assert config.model == tmp_path / "base"


def test_one_file_may_stand_for_a_list_of_files(write: Write, tmp_path: Path) -> None:
    train = str(tmp_path / "rows.jsonl")
    assert read_config(write(data={"train": [train, train]})).data.train == (Path(train), Path(train))
    assert read_config(write()).data.train == (Path(train),)


UNKNOWN = {
    "stepps: 4": "stepps is not a setting, did you mean steps?",
    "lora: {rnak: 4}": "lora.rnak is not a setting, did you mean rank?",
    "lora: {patterns: {experts: {rang: 4}}}": "lora.patterns['experts'].rang is not a setting, did you mean rank?",
    "optimizer: {zzz: 1}": "optimizer.zzz is not a setting; known are lr, min_lr_ratio, schedule",
    "7: 4": "7 is not a setting; known are model, output, data",
}


@pytest.mark.parametrize("text", UNKNOWN)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(write: Write, text: str) -> None:
    assert UNKNOWN[text] in refusal(write(text))


WRONG_TYPES = {
    "seed: 1.5": "seed = 1.5 must be a whole number",
    "seed: '3'": "seed = '3' must be a whole number",
    "seed: true": "seed = True must be a whole number",
    "seed:": "seed = None must be a whole number",
    "epochs: many": "epochs = 'many' must be a number",
    "optimizer: {lr: true}": "optimizer.lr = True must be a number",
    "optimizer: {lr: 1e-4x}": "optimizer.lr = '1e-4x' must be a number",
    "optimizer: 3": "optimizer must hold keys and values, found 3",
    "optimizer: []": "optimizer must hold keys and values, found []",
    "lora: {rslora: 1}": "lora.rslora = 1 must be true or false",
    "lora: {targets: [4]}": "lora.targets = 4 must be a text",
    "lora: {patterns: {experts: 8}}": "lora.patterns['experts'] must hold keys and values, found 8",
    "lora: {patterns: [experts]}": "lora.patterns must hold keys and values, found ['experts']",
    "lora: {patterns: {experts: {alpha: 2}}}": "lora.patterns['experts'].rank is missing",
    "output: 2024-05-06": "must be a path",
    "output: ''": "output = '' must be a path",
    "dtype: [float32]": "dtype = ['float32'] must be a text",
    "parallel: {layers: [1, x]}": "parallel.layers = 'x' must be a whole number",
}


@pytest.mark.parametrize("text", WRONG_TYPES)
def test_a_value_of_another_type_is_refused_by_its_key(write: Write, text: str) -> None:
    key = text.partition(":")[0]
    assert WRONG_TYPES[text] in refusal(write(text, **({key: None} if key == "output" else {})))


def test_all_problems_of_a_file_are_named_at_once(write: Write) -> None:
    said = refusal(write("lora: {rank: x}\nstepps: 4\noptimizer: {lr: fast}", output=None))
    for problem in ("output is missing", "stepps is not a setting", "lora.rank = 'x'", "optimizer.lr = 'fast'"):
        assert problem in said


NOT_YAML = {
    "[1, 2]": "expected keys and values at the top, found list",
    "": "expected keys and values at the top, found NoneType",
    "a: [": "cannot be read as YAML",
    "a: &x {b: *y}": "cannot be read as YAML",
    "? [1]\n: 2": "cannot be read as YAML",
    "a: !!python/object/apply:os.getcwd []": "cannot be read as YAML",
    "output: 2024-99-99": "cannot be read as YAML",  # PyYAML takes it for a date
    "a: \x07": "cannot be read as YAML",
    "[" * 5000: "cannot be read as YAML",
}


@pytest.mark.parametrize("text", NOT_YAML, ids=range(len(NOT_YAML)))
def test_a_file_that_is_no_configuration_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    assert NOT_YAML[text] in refusal(path)


def test_bytes_that_are_no_text_a_missing_file_and_a_huge_one_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    assert refusal(path).startswith(f"{path}: cannot be read as YAML")
    path.write_bytes(b"a: \xff\xfe")
    assert refusal(path).startswith(f"{path}: cannot be read as YAML")
    path.write_text("steps: 3\n" + "# \n" * MAX_CONFIG_BYTES)
    assert "is larger than" in refusal(path)
    assert "cannot be read" in refusal(tmp_path)


def test_overrides_replace_and_add_keys(write: Write) -> None:
    overrides = ("optimizer.lr=1e-3", "lora.targets=[o_proj, experts]", "lora.patterns.o_proj.rank=2", "seed=9")
    config = read_config(write("optimizer: {lr: 5, warmup_steps: 2}"), (*overrides, "selection.threshold=0.5"))
    assert (config.optimizer.lr, config.optimizer.warmup_steps, config.seed) == (1e-3, 2, 9)
    assert config.lora.targets == ("o_proj", "experts")
    assert config.lora.patterns == {"o_proj": ModuleLora(2)}
    assert config.selection == SelectionConfig(threshold=0.5)
    assert read_config(write("selection: {}"), ("selection=null",)).selection is None


BAD_OVERRIDES = {
    "seed": "expected KEY=VALUE",
    "=4": "expected KEY=VALUE",
    "seed.x=4": "seed is not a group of keys",
    "seed=[": "--set 'seed=['",
    "seed=2024-99-99": "--set 'seed=2024-99-99'",
    "optimizer.lrr=4": "optimizer.lrr is not a setting, did you mean lr?",
    "optimizer.lr=-1": "optimizer.lr = -1.0 is not allowed: above 0",
    "optimizer.=1": "optimizer. is not a setting",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_an_override_that_cannot_be_is_refused(write: Write, override: str) -> None:
    assert BAD_OVERRIDES[override] in refusal(write("seed: 1"), override)


OUT_OF_RANGE = [
    ("device", "tpu"), ("dtype", "float16"), ("model", "/nowhere"), ("steps", 0), ("epochs", 1.0), ("batch_rows", 0),
    ("micro_batch_rows", 0), ("micro_batch_rows", 3), ("log_every", 0), ("keep_checkpoints", 0), ("eval_every", -1),
    ("save_every", -1), ("check_replicas_every", -1), ("seed", -1), ("seed", 2**63), ("export_format", "gguf"),
    ("export_dtype", "int8"),
    ("data.train", []), ("data.train", "/nowhere.jsonl"), ("data.eval", "/nowhere.jsonl"), ("data.eval_fraction", 1.0),
    ("data.eval_fraction", -0.1), ("data.format", "csv"), ("data.template", "llama"), ("data.overlong", "wrap"),
    ("data.max_length", 1), ("lora.targets", []), ("lora.rank", -1), ("lora.rank", 513), ("lora.alpha", 0.0),
    ("lora.alpha", ".inf"), ("lora.alpha", ".nan"), ("lora.dropout", 1.0), ("lora.dropout", -0.1),
    ("lora.init", "zeros"), ("lora.patterns.experts.rank", 600), ("selection.by", "luck"),
    ("selection.threshold", 0.0), ("selection.threshold", 1.1), ("selection.sample_rows", 0),
    ("routing.aux_loss", -1.0), ("routing.aux_loss", ".inf"), ("routing.capacity_factor", 0.0),
    ("routing.capacity_factor", ".nan"), ("routing.overflow", "wait"), ("parallel.tp", 0), ("parallel.pp", 0),
    ("parallel.dp", -1), ("parallel.ep", 2), ("parallel.ep", 0), ("parallel.layers", [1, 2]), ("parallel.layers", [0]),
    ("parallel.layers", []), ("optimizer.lr", 0.0), ("optimizer.lr", ".nan"), ("optimizer.lr", ".inf"),
    ("optimizer.eps", 0.0), ("optimizer.lora_plus_ratio", 0.0), ("optimizer.min_lr_ratio", 1.5),
    ("optimizer.schedule", "step"), ("optimizer.warmup_steps", -1), ("optimizer.weight_decay", -0.1),
    ("optimizer.beta1", 1.0), ("optimizer.beta2", -0.1), ("optimizer.clip_norm", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE, ids=lambda value: str(value))
def test_a_value_out_of_range_is_refused_with_key_value_and_what_is_allowed(
    write: Write, key: str, value: object
) -> None:
    said = refusal(write(), f"{key}={value}")
    group, _, leaf = key.rpartition(".")
    # What concerns several keys is said of the one to change; patterns are named by their module.
    names = {"epochs": "steps, epochs", "micro_batch_rows": "batch_rows", "experts": "lora.patterns['experts']"}
    assert names.get(group.rpartition(".")[2], names.get(leaf, key)) in said
    assert " is not allowed: " in said


def test_ranges_that_depend_on_each_other(write: Write, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    assert "exactly one of the two" in refusal(write(steps=None))
    assert "0 beside data.eval" in refusal(write(data={"eval": str(rows), "eval_fraction": 0.5}))
    assert "a multiple of micro_batch_rows x dp (6)" in refusal(write(micro_batch_rows=3, parallel={"dp": 2}))
    said = refusal(write(parallel={"pp": 4, "dp": 2}, batch_rows=4))
    assert "batch_rows = 4 is not allowed: at least micro_batch_rows x dp x pp (8)" in said
    said = refusal(write(parallel={"tp": 2, "dp": 3, "ep": 4}, batch_rows=6))
    assert "parallel.ep = 4 is not allowed: a multiple of tp (2) that divides dp x tp (6)" in said


def test_a_configuration_survives_json_and_back(write: Write) -> None:
    text = "selection: {}\nparallel: {layers: [3]}\nlora: {patterns: {o_proj: {rank: 4, alpha: 2}}}\n"
    config = read_config(write(text, steps=None, epochs=1.5))
    plain = json.loads(json.dumps(as_plain(config)))
    assert from_plain(plain, "checkpoint") == config
    assert read_config(write(**plain)) == config
    changed = dataclasses.replace(config, seed=5)
    assert as_plain(changed) == as_plain(config) | {"seed": 5}


def test_an_adapter_is_stored_as_it_was_computed_unless_told_otherwise(write: Write) -> None:
    stored = [read_config(write(), (f"dtype={dtype}",)).stored_dtype for dtype in ("float32", "bfloat16")]
    assert stored == ["float32", "bfloat16"]
    assert read_config(write(), ("dtype=float32", "export_dtype=float16")).stored_dtype == "float16"


def test_a_kept_configuration_with_other_keys_is_refused_by_where_it_lies() -> None:
    with pytest.raises(ConfigError, match=r"^step-7: .*magic is not a setting.*model is missing"):
        from_plain({"magic": 1, "output": "x", "data": {"train": []}}, "step-7")
