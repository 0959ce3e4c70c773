"""Adapter directories: names put in plain form, partial adapters, and every reason to refuse, all named at once."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_builders import PREFIX, TinyModel, expert_factors, factors, write_adapter
from safetensors.torch import save_file
from torch import Tensor

from loaders.adapter import AdapterWeights, load_adapter
from loaders.errors import AdapterError

O_PROJ = "model.layers.0.self_attn.o_proj"
GOOD = factors(O_PROJ, 48, 24)
LAYER1 = "model.layers.1.mlp.experts"


def load(path: Path, tiny: TinyModel, **limits: Any) -> AdapterWeights:
    return load_adapter(path, tiny.targets, **limits)


def refusal(path: Path, tiny: TinyModel, **limits: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        load(path, tiny, **limits)
    return caught.value


def problem_of(path: Path, tiny: TinyModel, tensors: dict[str, Tensor], **config: Any) -> str:
    """The one problem of an adapter."""
    error = refusal(write_adapter(path, tensors, **config), tiny)
    assert len(error.problems) == 1, error.problems
    return error.problems[0]


def stack(in_features: int, out_features: int, rows: int = 16, inner: bool = False) -> dict[str, Tensor]:
    name = f"{PREFIX}{LAYER1}{'.base_layer' if inner else ''}"
    return {
        f"{name}.lora_A.weight": torch.ones(rows, in_features),
        f"{name}.lora_B.weight": torch.ones(out_features, rows),
    }


def test_an_adapter_of_some_experts_and_layers_holds_exactly_those(tiny: TinyModel, tmp_path: Path) -> None:
    tensors = expert_factors(1, 3) | factors(f"{LAYER1}.0.up_proj", 16, 48, lora_rank=2)
    weights = load(write_adapter(tmp_path, tensors), tiny)
    assert list(weights.experts) == [1]
    assert list(weights.experts[1]) == [0, 3]
    only_up = weights.experts[1][0]
    assert (only_up.gate, only_up.down) == (None, None)
    assert only_up.up is not None
    assert (only_up.up.lora_rank, only_up.up.scale) == (2, 4.0)
    assert torch.equal(only_up.up.a, tensors[f"{PREFIX}{LAYER1}.0.up_proj.lora_A.weight"])
    assert weights.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_an_expert_whose_lora_b_is_zero_is_left_out_with_its_reason(tiny: TinyModel, tmp_path: Path) -> None:
    zero = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in expert_factors(1, 0).items()}
    weights = load(write_adapter(tmp_path, zero | expert_factors(1, 2)), tiny)
    assert list(weights.experts[1]) == [2]
    assert len(weights.skipped) == 3


@pytest.mark.parametrize(
    "form",
    [
        "{module}.lora_{side}.weight",
        "base_model.model.{module}.lora_{side}.weight",
        "base_model.model.{module}.lora_{side}.default.weight",
        "module.base_model.model.{module}.lora_{side}.my_adapter.weight",
        "base_model.model._orig_mod.{module}.lora_{side}.weight",
        "base_model.model.model._orig_mod.{inner}.lora_{side}.weight",
        "base_model.model.language_model.{module}.lora_{side}.weight",
        "base_model.model.model.language_model.{inner}.lora_{side}.weight",
        "base_model.model.{inner}.lora_{side}.weight",
    ],
)
def test_prefixes_and_adapter_names_in_keys_make_no_difference(tiny: TinyModel, tmp_path: Path, form: str) -> None:
    tensors = {
        form.format(module=O_PROJ, inner=O_PROJ.removeprefix("model."), side=side): tensor
        for side, tensor in zip("AB", GOOD.values(), strict=True)
    }
    weights = load(write_adapter(tmp_path, tensors), tiny)
    assert list(weights.linears) == [O_PROJ]
    assert torch.equal(weights.linears[O_PROJ].a, next(iter(GOOD.values())))


def test_prediction_layers_head_copies_and_empty_tensors_are_skipped_with_reasons(
    tiny: TinyModel, tmp_path: Path
) -> None:
    tensors = GOOD | factors("model.layers.3.self_attn.o_proj", 48, 24) | factors("lm_head", 96, 48)
    tensors[f"{PREFIX}lm_head.base_layer.weight"] = torch.ones(96, 48)
    tensors[f"{PREFIX}{LAYER1}.0.up_proj.lora_A.weight"] = torch.empty(0, 48)
    tensors[f"{PREFIX}{LAYER1}.0.up_proj.lora_B.weight"] = torch.empty(16, 0)
    weights = load(write_adapter(tmp_path, tensors), tiny)
    assert sorted(weights.linears) == ["lm_head", O_PROJ]
    reasons = dict(weights.skipped)
    assert len(reasons) == 5
    assert "copy of the base's own weight" in reasons[f"{PREFIX}lm_head.base_layer.weight"]
    assert "multi-token-prediction" in reasons[f"{PREFIX}model.layers.3.self_attn.o_proj.lora_A.weight"]
    assert "empty" in reasons[f"{PREFIX}{LAYER1}.0.up_proj.lora_B.weight"]


def test_layers_far_beyond_the_base_are_another_models_and_refused(tiny: TinyModel, tmp_path: Path) -> None:
    tensors = dict(GOOD)
    for layer in range(3, 27):
        tensors |= factors(f"model.layers.{layer}.self_attn.o_proj", 48, 24)
    error = refusal(write_adapter(tmp_path, tensors), tiny)
    assert len(error.problems) == 24
    assert all("the base has only 3 layers" in problem for problem in error.problems)


def test_all_problems_of_a_file_are_named_at_once(tiny: TinyModel, tmp_path: Path) -> None:
    tensors = {
        **factors(O_PROJ, 48, 25),
        **factors("model.layers.1.self_attn.q_proj", 48, 48),
        **factors("model.layers.1.mlp.gate", 4, 48),
        **factors("model.layers.0.mlp.experts.0.up_proj", 16, 48),
        **factors(f"{LAYER1}.4.up_proj", 16, 48),
        **factors(f"{LAYER1}.1.up_proj", 16, 48, lora_rank=129),
        f"{PREFIX}model.layers.2.self_attn.o_proj.lora_A.weight": torch.ones(4, 24),
        f"{PREFIX}model.layers.1.self_attn.o_proj.lora_A.weight": torch.ones(4, 24),
        f"{PREFIX}model.layers.1.self_attn.o_proj.lora_B.weight": torch.ones(48, 5),
        f"{PREFIX}model.norm.weight": torch.ones(48),
        f"{PREFIX}{O_PROJ}.lora_magnitude_vector": torch.ones(48),
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 96),
        f"{PREFIX}{O_PROJ}.lora_B.bias": torch.ones(48),
    }
    error = refusal(write_adapter(tmp_path, tensors, use_dora=True), tiny)
    words = [
        "use_dora is set",
        f"{O_PROJ}: lora_A is [4, 25], expected [r, 24]",
        "q_proj: the base has q_a_proj and q_b_proj instead",
        "model.layers.1.mlp.gate: LoRA on the router",
        "layer 0 of the base has no routed experts",
        f"{LAYER1}.4.up_proj: the base has 4 experts",
        "rank 129 is above the allowed 128",
        "model.layers.2.self_attn.o_proj: has lora_A but no lora_B",
        "lora_A has rank 4, lora_B has rank 5",
        "model.norm.weight: a full weight [48]",
        "a DoRA magnitude",
        "LoRA on the token embedding",
        "biases are not supported",
    ]
    assert len(error.problems) == len(words), error.problems
    for text in words:
        assert any(text in problem for problem in error.problems), text


def test_the_base_an_adapter_was_trained_on_is_guessed_from_its_hidden_size(tiny: TinyModel, tmp_path: Path) -> None:
    for number, tensors in enumerate((factors(f"{LAYER1}.0.up_proj", 16, 2048), factors(O_PROJ, 2048, 24))):
        problem = problem_of(tmp_path / str(number), tiny, tensors)
        assert "looks like it was trained on a base with hidden 2048 (V2-Lite or Moonlight)" in problem
    assert "hidden 7168 (V3, R1, V3.1 or Kimi-K2)" in problem_of(tmp_path / "s", tiny, stack(7168, 4096))


def test_numbers_in_names_have_one_spelling(tiny: TinyModel, tmp_path: Path) -> None:
    for number, spelling in enumerate(("00", "\u0660", "+0")):
        problem = problem_of(tmp_path / str(number), tiny, factors(f"{LAYER1}.{spelling}.up_proj", 16, 48))
        assert "not a dense MLP of this name" in problem


def test_two_keys_for_one_factor_are_a_duplicate(tiny: TinyModel, tmp_path: Path) -> None:
    tensors = GOOD | {f"{O_PROJ}.lora_A.weight": torch.ones(4, 24)}
    assert "duplicate" in problem_of(tmp_path, tiny, tensors)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (stack(48, 33), "expected in/out 48/32 (gate_up_proj) or 16/48 (down_proj)"),
        (stack(48, 32, rows=18), "18 is not a multiple of the base's 4 experts"),
        (stack(32, 48), "peft_version '0.21.2' wrote stacks with in and out as in the base, these are the other way"),
        (stack(48, 32) | stack(48, 32, inner=True), "both are gate_up_proj of layer 1"),
        (stack(48, 32) | expert_factors(2, 0), "experts in two layouts at once"),
        (factors("model.layers.0.mlp.experts", 48, 16, 16), "layer 0 of the base has no routed experts"),
        (factors(f"{LAYER1}.w1", 16, 48), "expected [4 or 1, r, 48] and [4 or 1, 16, r] for this base"),
        (factors(f"{LAYER1}.gate_proj", 16, 48), "expected [4 or 1, r, 48] and [4 or 1, 16, r] for this base"),
    ],
)
def test_stacked_and_foreign_expert_layouts_are_checked(
    tiny: TinyModel, tmp_path: Path, tensors: dict[str, Tensor], words: str
) -> None:
    assert words in problem_of(tmp_path, tiny, tensors, peft_version="0.21.2")


def test_a_stack_may_have_twice_the_allowed_rank_only_if_it_splits(tiny: TinyModel, tmp_path: Path) -> None:
    tensors = stack(48, 32)
    b = tensors[f"{PREFIX}{LAYER1}.lora_B.weight"]
    path = write_adapter(tmp_path, tensors, peft_version="0.21.2")
    assert "rank 4 is above the allowed 2" in refusal(path, tiny, max_lora_rank=2).problems[0]
    view = b.view(32, 4, 4)  # out, rank, expert
    view[:16, 2:], view[16:, :2] = 0, 0
    gate = load(write_adapter(tmp_path, tensors, peft_version="0.21.2"), tiny, max_lora_rank=2).experts[1][0].gate
    assert gate is not None
    assert gate.lora_rank == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"monteclora_config": {"a": 1}}, "monteclora_config is set"),
        ({"some_new_trick": 0.5}, "some_new_trick is set to 0.5, a setting this loader does not know"),
        ({"lora_alpha": None}, "lora_alpha must be a positive number"),
        ({"lora_alpha": "16"}, "lora_alpha must be a positive number"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"rank_pattern": {"o_proj": 8}}, "rank 4 in the tensors, but rank_pattern"),
        ({"alpha_pattern": {"o_proj": -1}}, "alpha_pattern['o_proj'] must be a positive number"),
        ({"alpha_pattern": {"(o_proj": 1}}, "is not a regular expression"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "too complex a regular expression"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a positive number"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"target_parameters": {"a": 1}}, "target_parameters must be a list of names"),
    ],
)
def test_settings_that_change_the_result_are_refused_by_name(
    tiny: TinyModel, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    assert words in problem_of(tmp_path, tiny, GOOD, **config)


def test_a_rank_unlike_the_configs_is_taken_from_the_tensors_with_a_warning(tiny: TinyModel, tmp_path: Path) -> None:
    weights = load(write_adapter(tmp_path, GOOD, r=8), tiny)
    assert (weights.linears[O_PROJ].lora_rank, weights.linears[O_PROJ].scale) == (4, 2.0)
    assert "another rank than r = 8" in weights.warnings[0]


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "contains NaN"), (float("inf"), "contains infinite values")]
)
def test_values_that_are_not_finite_are_refused_by_name(
    tiny: TinyModel, tmp_path: Path, value: float, words: str
) -> None:
    for number, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        tensors = {name: tensor.to(dtype, copy=True) for name, tensor in GOOD.items()}
        name = f"{PREFIX}{O_PROJ}.lora_B.weight"
        tensors[name][7, 2] = -value
        assert problem_of(tmp_path / str(number), tiny, tensors) == f"{name}: {words}"


def test_other_number_types_are_refused(tiny: TinyModel, tmp_path: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in GOOD.items()}
    error = refusal(write_adapter(tmp_path, tensors), tiny)
    assert all("stored as F64, only F32, F16 and BF16" in problem for problem in error.problems)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pkl", "weights.pth"])
def test_pickled_weights_are_refused_even_beside_safetensors(tiny: TinyModel, tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path, GOOD)
    (tmp_path / name).write_bytes(b"")
    assert f"{name}: pickled weights are never read" in refusal(tmp_path, tiny).problems[0]


def test_training_state_beside_the_adapter_is_skipped_and_never_opened(tiny: TinyModel, tmp_path: Path) -> None:
    write_adapter(tmp_path, GOOD)
    names = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "other.safetensors"]
    for name in names:
        (tmp_path / name).mkdir()  # opening any of these would fail
    assert sorted(name for name, _ in load(tmp_path, tiny).skipped) == sorted(names)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_symbolic_links_pipes_and_directories_in_place_of_files_are_refused(
    tiny: TinyModel, tmp_path: Path, name: str
) -> None:
    write_adapter(tmp_path / "a", GOOD)
    file = tmp_path / "a" / name
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    assert f"{name} cannot be opened (a symbolic link)" in str(refusal(tmp_path / "a", tiny))
    file.unlink()
    os.mkfifo(file)
    assert f"{name} is not a regular file" in str(refusal(tmp_path / "a", tiny))
    file.unlink()
    file.mkdir()
    assert f"{name} is not a regular file" in str(refusal(tmp_path / "a", tiny))


def test_files_that_are_too_large_are_refused_before_they_are_read(tiny: TinyModel, tmp_path: Path) -> None:
    write_adapter(tmp_path, GOOD)
    assert "at most 100 are allowed" in str(refusal(tmp_path, tiny, max_bytes=100))
    weights = tmp_path / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes((16 * 1024 * 1024 + 1).to_bytes(8, "little") + good[8:])
    assert "header of 16777217 bytes, at most 16777216" in str(refusal(tmp_path, tiny))
    weights.write_bytes(good)
    (tmp_path / "adapter_config.json").write_text('{"task_type": "' + "x" * 2**20 + '"}')
    assert "adapter_config.json is larger than" in str(refusal(tmp_path, tiny))


def corrupt(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too short"),
        (b"\xff\0\0\0\0\0\0\0{}", "too short"),
        (b"\x02\0\0\0\0\0\0\0[]", "expected a JSON object"),
        (b"\x02\0\0\0\0\0\0\0{{", "not valid JSON"),
        (corrupt({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b""), "truncated"),
        (corrupt({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"), "1 bytes after the last"),
        (corrupt({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"), "leaves a hole"),
        (corrupt({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "has 4 bytes, not 8"),
        (corrupt({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "malformed"),
        (corrupt({"a": {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 4]}}, b"1234"), "not 0"),
        (corrupt({"a": {"dtype": 1, "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "malformed"),
        (corrupt({"a": {"shape": [1]}}, b"1234"), "lacks dtype"),
        (corrupt({"a": 7}, b"1234"), "lacks dtype"),
        (corrupt({"a\x1b[2J": 7}, b""), "'a\\x1b[2J' is not a usable tensor name"),
    ],
)
def test_broken_safetensors_files_are_refused_with_the_reason(
    tiny: TinyModel, tmp_path: Path, content: bytes, words: str
) -> None:
    write_adapter(tmp_path, GOOD)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    assert words in str(refusal(tmp_path, tiny))


def test_the_digest_covers_the_bytes_of_every_file_read(tiny: TinyModel, tmp_path: Path) -> None:
    write_adapter(tmp_path, GOOD)
    lines = []
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = (tmp_path / name).read_bytes()
        lines.append(f"{name} {len(data)} {hashlib.sha256(data).hexdigest()}\n")
    digest = load(tmp_path, tiny).digest
    assert digest == "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()
    (tmp_path / "README.md").write_text("not read, not hashed")
    assert load(tmp_path, tiny).digest == digest
    write_adapter(tmp_path, GOOD, lora_alpha=9)
    assert load(tmp_path, tiny).digest != digest


def test_a_sharded_adapter_loads_and_a_missing_shard_is_named(tiny: TinyModel, tmp_path: Path) -> None:
    write_adapter(tmp_path, GOOD)
    (tmp_path / "adapter_model.safetensors").unlink()
    for number, (name, tensor) in enumerate(GOOD.items(), 1):
        save_file({name: tensor}, tmp_path / f"adapter_model-{number:05d}-of-00002.safetensors")
    assert list(load(tmp_path, tiny).linears) == [O_PROJ]
    (tmp_path / "adapter_model-00001-of-00002.safetensors").unlink()
    assert "shard 1 of 2" in refusal(tmp_path, tiny).problems[0]


@pytest.mark.parametrize("text", ["", '{"r": 8, "target_mod', "[]"], ids=["empty", "cut", "list"])
def test_missing_weights_and_a_broken_config_are_told_together(tiny: TinyModel, tmp_path: Path, text: str) -> None:
    write_adapter(tmp_path, GOOD)
    (tmp_path / "adapter_config.json").write_text(text)
    told = str(refusal(tmp_path, tiny))
    assert told.startswith(f"{tmp_path}: adapter_config.json: ")
    (tmp_path / "adapter_model.safetensors").unlink()
    weights, config = refusal(tmp_path, tiny).problems
    assert weights == "no adapter_model.safetensors in the directory"
    assert told == f"{tmp_path}: {config}"


def test_a_directory_that_is_not_an_adapter_says_where_one_may_be(tiny: TinyModel, tmp_path: Path) -> None:
    assert "not an adapter directory" in str(refusal(tmp_path / "nowhere", tiny))
    assert "no adapter_config.json" in str(refusal(tmp_path, tiny))
    write_adapter(tmp_path / "named", GOOD)
    assert "adapters lie in its subdirectories: named" in str(refusal(tmp_path, tiny))
    for step in (90, 1000, 200):
        shutil.copytree(tmp_path / "named", tmp_path / f"checkpoint-{step}")
    assert "checkpoint-1000" in str(refusal(tmp_path, tiny))
    write_adapter(tmp_path, {})
    assert "no LoRA factors" in refusal(tmp_path, tiny).problems[0]
