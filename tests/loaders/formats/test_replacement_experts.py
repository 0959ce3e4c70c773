"""ESFT adapters: full weights of chosen experts, read into their own structure, and refused where LoRA is expected."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from loaders.adapter import load_adapter
from loaders.adapter_folder import folder_digest
from loaders.errors import AdapterError
from loaders.replacement_experts import (
    describe_replacement,
    is_esft,
    load_replacement_experts,
    most_experts_of_a_layer,
)
from tests.loaders.formats.layouts import HIDDEN, LAYER, MOE, TARGETS, WIDTHS

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
CONFIG: dict[str, Any] = {"experts": {str(LAYER): [0, 2]}, "shared_experts": False, "non_expert_modules": False}


def weights(*experts: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{MOE}.{expert}.{kind}_proj.weight": torch.randn(shape, generator=generator).bfloat16()
        for expert in experts
        for kind, shape in WIDTHS.items()
    }


def write(path: Path, *files: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    for number, tensors in enumerate(files, 1):
        save_file(tensors, path / f"model-{number:05d}-of-{len(files):05d}.safetensors")
    (path / "expert_cfg.json").write_text(json.dumps(CONFIG if config is None else config))
    return path


def refusal(path: Path, *files: dict[str, Tensor], **config: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        load_replacement_experts(write(path, *files, config=CONFIG | config), TARGETS)
    return caught.value


def test_the_chosen_experts_are_read_as_they_are_stored(tmp_path: Path) -> None:
    stored = weights(0, 2)
    path = write(tmp_path, weights(0), {key: tensor for key, tensor in stored.items() if ".2." in key})
    assert is_esft(path)
    loaded = load_replacement_experts(path, TARGETS)
    assert {layer: list(experts) for layer, experts in loaded.experts.items()} == {LAYER: [0, 2]}
    for expert, replacement in loaded.experts[LAYER].items():
        for kind in ("gate", "up", "down"):
            assert torch.equal(getattr(replacement, kind), stored[f"{MOE}.{expert}.{kind}_proj.weight"])
    assert loaded.num_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert loaded.digest.startswith("sha256:")
    assert f"layer {LAYER}  2 of 4  0,2" in describe_replacement(loaded, TARGETS)


def test_files_of_the_first_version_without_the_models_prefix_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, {key.removeprefix("model."): tensor for key, tensor in weights(0, 2).items()})
    assert list(load_replacement_experts(path, TARGETS).experts[LAYER]) == [0, 2]


def test_where_lora_is_expected_it_is_refused_by_its_kind(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"an ESFT adapter \(full weights of chosen experts, not LoRA\)"):
        load_adapter(write(tmp_path, weights(0, 2)), TARGETS)


def test_every_problem_of_an_esft_folder_is_named(tmp_path: Path) -> None:
    tensors = weights(0, 3)
    del tensors[f"{MOE}.0.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    tensors["model.layers.0.mlp.experts.0.up_proj.weight"] = torch.ones(2, 2)
    tensors[f"{MOE}.9.up_proj.weight"] = torch.ones(16, 48)
    tensors[f"{MOE}.2.up_proj.weight"] = torch.ones(16, 2048)
    tensors[f"{MOE}.2.gate_proj.weight"] = torch.ones(WIDTHS["gate"]).double()
    problems = refusal(tmp_path, tensors, shared_experts=True, mystery=1).problems
    words = [
        "shared_experts is set: only routed experts can be replaced",
        "'mystery' is a setting this loader does not know",
        "model.norm.weight: not a weight of a routed expert",
        "layer 0 of the base has no routed experts",
        f"{MOE}.9.up_proj.weight: the base has 4 experts",
        "hidden 2048 (V2-Lite or Moonlight)",
        "stored as F64",
        "layer 1: expert 3 is in the files, but not in expert_cfg.json",
        "layer 1: expert 0 lacks up_proj",
        "layer 1: expert 2 lacks gate_proj, up_proj, down_proj",
    ]
    assert len(problems) == len(words), problems
    for text in words:
        assert any(text in problem for problem in problems), text


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ({}, "must name at least one expert"),
        ([1], "must name at least one expert"),
        ({"1": []}, "must name at least one expert"),
        ({"one": [0]}, "layer 'one' of the base has no routed experts"),
        ({"0": [0]}, "layer '0' of the base has no routed experts"),
        ({"1": [4]}, "must be indices from 0 to 3"),
        ({"1": [True]}, "must be indices from 0 to 3"),
        ({"1": 0}, "must be indices from 0 to 3"),
    ],
)
def test_a_wrong_choice_of_experts_is_refused(tmp_path: Path, experts: object, words: str) -> None:
    assert any(words in problem for problem in refusal(tmp_path, weights(0), experts=experts).problems)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(experts=st.dictionaries(st.just(str(LAYER)) | st.text(max_size=3), ANY_JSON) | ANY_JSON, room=st.integers(0, 2))
def test_whatever_the_configuration_says_it_is_read_or_refused(tmp_path: Path, experts: object, room: int) -> None:
    path = write(tmp_path, weights(0, 2), config=CONFIG | {"experts": experts})
    assert most_experts_of_a_layer(path) >= 0
    with contextlib.suppress(AdapterError):
        load_replacement_experts(path, TARGETS, max_experts_per_layer=room)


def test_more_experts_than_there_is_room_for_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, weights(0, 2))
    assert most_experts_of_a_layer(path) == 2
    assert load_replacement_experts(path, TARGETS, max_experts_per_layer=2).num_bytes > 0
    with pytest.raises(AdapterError, match=f"replaces 2 experts of layer {LAYER}.* room for 1 in a layer"):
        load_replacement_experts(path, TARGETS, max_experts_per_layer=1)


def test_the_digest_that_is_told_without_loading_is_that_of_a_load(tmp_path: Path) -> None:
    path = write(tmp_path, weights(0, 2))
    assert folder_digest(path) == load_replacement_experts(path, TARGETS).digest


def test_values_that_are_not_finite_and_missing_shards_are_refused(tmp_path: Path) -> None:
    tensors = weights(0, 2)
    tensors[f"{MOE}.2.down_proj.weight"][0, 0] = float("nan")
    assert refusal(tmp_path / "nan", tensors).problems == (f"{MOE}.2.down_proj.weight: contains NaN",)
    path = write(tmp_path / "shards", weights(0), weights(2))
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(AdapterError) as caught:
        load_replacement_experts(path, TARGETS)
    assert caught.value.problems == ("shard 2 of 2 of model.safetensors is missing",)
