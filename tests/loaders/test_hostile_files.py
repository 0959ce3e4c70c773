"""Whatever the bytes of a file are, loading ends with weights or with a refusal, never with another exception."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loader_builders import TinyModel, expert_factors, factors, write_adapter, write_model

from loaders.adapter import describe, load_adapter
from loaders.base import stream_base
from loaders.config_json import read_config
from loaders.errors import AdapterError, CheckpointError

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ADAPTER_KEYS = [
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "bias"),
    *("init_lora_weights", "auto_mapping", "peft_version", "lora_B_layout", "modules_to_save", "unknown"),
]
MODEL_KEYS = ["rope_theta", "rope_scaling", "rope_parameters", "text_config", "max_position_embeddings"]
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def mutated(data: st.DataObject, good: bytes) -> bytes:
    """`good` with some bytes overwritten, a piece removed, or cut off."""
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, min(len(content), 1200) - 1))
        piece = data.draw(st.binary(max_size=4) | st.sampled_from([b"{", b"}", b"[", b"0", b"9999", b'"', b",", b"-"]))
        length = data.draw(st.integers(0, 4))
        content[position : position + length] = piece
    return bytes(content)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def load(tiny: TinyModel, directory: Path) -> Callable[[], None]:
    def run() -> None:
        with contextlib.suppress(AdapterError):
            describe(load_adapter(directory, tiny.targets), tiny.targets)

    return run


@QUICK
@given(data=st.data())
def test_an_adapter_file_with_broken_bytes(directory: Path, load: Callable[[], None], data: st.DataObject) -> None:
    write_adapter(directory, expert_factors(1, 0) | factors("lm_head", 96, 48))
    file = directory / "adapter_model.safetensors"
    file.write_bytes(mutated(data, file.read_bytes()))
    load()


@QUICK
@given(config=st.dictionaries(st.sampled_from(ADAPTER_KEYS), ANY_JSON))
def test_an_adapter_config_with_any_values(
    directory: Path, load: Callable[[], None], config: dict[str, object]
) -> None:
    write_adapter(directory, expert_factors(1, 0) | factors("model.layers.1.mlp.experts", 48, 16, 16), **config)
    load()


@QUICK
@given(data=st.data())
def test_a_base_file_with_broken_bytes(tiny: TinyModel, directory: Path, data: st.DataObject) -> None:
    names = ["model.norm.weight", "model.layers.0.self_attn.o_proj.weight"]
    write_model(directory, [{name: tiny.tensors[name] for name in names}])
    file = directory / "model.safetensors"
    file.write_bytes(mutated(data, file.read_bytes()))
    with contextlib.suppress(CheckpointError):
        for _ in stream_base(directory, {n: tiny.expected[n] for n in names}, tiny.tensors[names[0]].dtype,
                             ignored_layers_from=3):  # fmt: skip
            pass


@QUICK
@given(config=st.dictionaries(st.sampled_from(MODEL_KEYS), ANY_JSON))
def test_a_model_config_with_any_values(directory: Path, config: dict[str, object]) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(CheckpointError):
        rope = read_config(directory)
        assert isinstance(rope.get("rope_theta", 1.0), float) or isinstance(rope.get("text_config"), dict)


EXPERTS = "model.layers.1.mlp.experts"
FACTOR_NAMES = [
    *(f"{EXPERTS}{inner}.lora_{side}.weight" for inner in ("", ".base_layer", ".0.up_proj", ".up_proj", ".gate_up_proj",
                                                          ".w1", ".w2", ".0.w3") for side in "AB"),
    *(f"{EXPERTS}.lora_{part}_{side}" for part in ("gate_and_up", "down") for side in "AB"),
]  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 32, 48]), max_size=4)


@QUICK
@given(shapes=st.dictionaries(st.sampled_from(FACTOR_NAMES), SHAPES, min_size=1, max_size=4), version=st.sampled_from(
    ["0.18.1", "0.21.2", None]))  # fmt: skip
def test_factors_of_any_layout_and_shape(
    directory: Path, load: Callable[[], None], shapes: dict[str, list[int]], version: str | None
) -> None:
    tensors = {f"base_model.model.{name}": torch.ones(shape) for name, shape in shapes.items()}
    write_adapter(directory, tensors, peft_version=version)
    load()
