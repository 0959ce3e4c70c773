"""Every layout loads to the weights that its own definition means, and is recognised by what is in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loader_builders import assert_same_deltas, our_deltas, write_adapter

from loaders.adapter import AdapterWeights, describe, load_adapter
from loaders.errors import AdapterError
from tests.loaders.formats.layouts import (
    ALPHA,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    LAYER,
    LAYOUTS,
    MOE,
    PREFIX,
    RANK,
    TARGETS,
    Written,
    per_expert,
    sglang_shared_outer,
    sglang_stacks,
    tinker,
)


def write(path: Path, written: Written) -> Path:
    return write_adapter(path, written.tensors, **{"r": RANK, "lora_alpha": ALPHA} | written.config)


def load(path: Path, written: Written) -> AdapterWeights:
    return load_adapter(write(path, written), TARGETS)


def problem_of(path: Path, written: Written) -> str:
    with pytest.raises(AdapterError) as caught:
        load(path, written)
    assert len(caught.value.problems) == 1, caught.value.problems
    return caught.value.problems[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_weights_that_its_definition_gives(tmp_path: Path, name: str) -> None:
    written = LAYOUTS[name]()
    weights = load(tmp_path, written)
    assert_same_deltas(our_deltas(weights), written.deltas, 1e-4)
    assert weights.layout.startswith(name.partition(",")[0] if "w1" not in name else name)
    assert weights.evidence
    assert (weights.skipped, weights.warnings) == ((), ())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_takes_the_bytes_of_its_own_tensors(tmp_path: Path, name: str) -> None:
    written = LAYOUTS[name]()
    assert load(tmp_path, written).num_bytes == sum(tensor.nbytes for tensor in written.tensors.values())


@pytest.mark.parametrize("make", [sglang_shared_outer, tinker])
def test_a_factor_shared_by_all_experts_is_one_tensor_with_a_mark(tmp_path: Path, make: type[Written]) -> None:
    weights = load(tmp_path, make())
    experts = list(weights.experts[LAYER].values())
    for kind in ("gate", "up", "down"):
        pairs = [getattr(expert, kind) for expert in experts]
        assert len(pairs) == EXPERTS
        assert all(pair.a_is_shared == (kind != "down") and pair.b_is_shared == (kind == "down") for pair in pairs)
        assert len({id(pair.b if kind == "down" else pair.a) for pair in pairs}) == 1
        assert len({id(pair.a if kind == "down" else pair.b) for pair in pairs}) == EXPERTS
    assert "(shared factors)" in describe(weights, TARGETS)


def test_a_zero_expert_of_a_stack_is_left_out_and_said(tmp_path: Path) -> None:
    written = sglang_stacks()
    written.tensors[f"{PREFIX}{MOE}.up_proj.lora_B.weight"][2] = 0
    written.tensors[f"{PREFIX}{MOE}.up_proj.lora_A.weight"][0] = 0
    weights = load(tmp_path, written)
    assert [weights.experts[LAYER][expert].up is None for expert in range(EXPERTS)] == [True, False, True, False]
    assert "2 of 4 experts is all zero" in dict(weights.skipped)[f"{MOE}.up_proj"]


def test_a_shared_factor_without_its_other_half_is_named(tmp_path: Path) -> None:
    written = sglang_shared_outer()
    for expert in range(EXPERTS):
        del written.tensors[f"{PREFIX}{MOE}.{expert}.up_proj.lora_B.weight"]
    assert problem_of(tmp_path, written) == f"{MOE}.up_proj: has lora_A but no lora_B"


def with_tensor(written: Written, key: str, *shape: int) -> Written:
    written.tensors[PREFIX + key] = torch.ones(*shape)
    return written


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("gate_proj.lora_A.weight", (EXPERTS, RANK, 2048), "hidden 2048 (V2-Lite or Moonlight)"),
        ("gate_proj.lora_A.weight", (EXPERTS + 1, RANK, HIDDEN), "expected [4 or 1, r, 48] and [4 or 1, 16, r]"),
        ("down_proj.lora_B.weight", (EXPERTS, RANK, HIDDEN), "expected [4 or 1, r, 16] and [4 or 1, 48, r]"),
        ("up_proj.lora_B.weight", (EXPERTS, INTERMEDIATE, RANK + 1), "lora_B [4, 16, 3]"),
    ],
)
def test_stacks_of_another_base_are_refused(tmp_path: Path, key: str, shape: tuple[int, ...], words: str) -> None:
    assert words in problem_of(tmp_path, with_tensor(sglang_stacks(), f"{MOE}.{key}", *shape))


def test_experts_in_two_layouts_are_refused(tmp_path: Path) -> None:
    written = per_expert()
    written.tensors |= {key: tensor for key, tensor in sglang_stacks().tensors.items() if ".up_proj." in key}
    assert "experts in two layouts at once" in problem_of(tmp_path, written)


def test_a_hint_that_the_file_has_no_use_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="--format-hint unsloth has no effect"):
        load_adapter(write(tmp_path, per_expert()), TARGETS, writer="unsloth")


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("module.model.", ".weight"),
        ("base_model.model.module.", ".default.weight"),
        ("base_model.model.model.language_model.", ".weight"),
        ("_orig_mod.module.model._checkpoint_wrapped_module.", ".weight"),
        ("", ".adapter_1.weight"),
    ],
)
def test_wrappers_around_stacks_make_no_difference(tmp_path: Path, prefix: str, suffix: str) -> None:
    written = sglang_stacks()
    renamed = {
        prefix + key.removeprefix(PREFIX + "model.").removesuffix(".weight") + suffix: tensor
        for key, tensor in written.tensors.items()
    }
    assert_same_deltas(our_deltas(load(tmp_path, Written(renamed))), written.deltas, 1e-4)
