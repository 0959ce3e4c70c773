"""Both ways of writing RoPE give one form; wrong files are named."""

import json
from pathlib import Path

import pytest
from loader_builders import YARN, TinyModel

from loaders.config_json import MAX_CONFIG_BYTES, read_config
from loaders.errors import CheckpointError


def write(path: Path, config: object) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_the_form_that_transformers_v5_saves_becomes_rope_theta_and_rope_scaling(tiny: TinyModel) -> None:
    assert "rope_parameters" in json.loads((tiny.path / "config.json").read_text())
    config = read_config(tiny.path)
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"] == YARN
    assert "rope_parameters" not in config
    assert config["kv_lora_rank"] == 16


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_the_classic_form_gives_the_same_with_either_name_of_the_type(tmp_path: Path, key: str) -> None:
    scaling = {name: value for name, value in YARN.items() if name != "rope_type"}
    config = read_config(write(tmp_path, {"rope_theta": 10000, "rope_scaling": {key: "yarn", **scaling}}))
    assert config["rope_theta"] == 10000.0
    assert isinstance(config["rope_theta"], float)
    assert config["rope_scaling"] == YARN


def test_both_forms_mean_what_transformers_reads_in_them(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config

    classic = {"rope_theta": 50000.0, "max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 32.0}}
    ours = read_config(write(tmp_path, classic))
    theirs = DeepseekV3Config(**json.loads(json.dumps(classic))).rope_parameters
    assert theirs is not None
    assert ours["rope_theta"] == theirs["rope_theta"]
    assert ours["rope_scaling"] == {k: v for k, v in dict(theirs).items() if k not in ("rope_theta", "type")}


def test_no_scaling_is_none_in_every_spelling(tmp_path: Path) -> None:
    for config in (
        {"rope_theta": 50000},
        {"rope_theta": 50000, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50000}},
    ):
        read = read_config(write(tmp_path, config))
        assert (read["rope_theta"], read["rope_scaling"]) == (50000.0, None)
    assert read_config(write(tmp_path, {}))["rope_theta"] == 10000.0


def test_a_nested_text_config_is_normalised_where_it_is(tmp_path: Path) -> None:
    text = {"model_type": "kimi_k2", "rope_theta": 50000, "rope_scaling": {"type": "yarn", "factor": 64.0}}
    config = read_config(write(tmp_path, {"model_type": "kimi_k25", "text_config": text}))
    assert config["text_config"]["rope_scaling"] == {"rope_type": "yarn", "factor": 64.0}
    assert config["text_config"]["model_type"] == "kimi_k2"
    assert "rope_scaling" not in config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_theta": "big"}, "rope_theta must be a positive number"),
        ({"rope_theta": -1}, "rope_theta must be a positive number"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "rope_scaling.factor must be a positive number"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type must be a string"),
        ([], "expected a JSON object"),
    ],
)
def test_a_wrong_value_is_refused_with_file_and_key(tmp_path: Path, config: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        read_config(write(tmp_path, config))
    assert "config.json" in str(caught.value)


def test_a_missing_broken_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not found"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(CheckpointError, match="appears twice"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('"' + "x" * MAX_CONFIG_BYTES + '"')
    with pytest.raises(CheckpointError, match="larger than the allowed"):
        read_config(tmp_path)
