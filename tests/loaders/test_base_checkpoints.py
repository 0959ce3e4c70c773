"""Base checkpoints stream back exactly as written; every difference is refused by name before anything is read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loader_builders import TinyModel, write_model
from torch import Tensor

from loaders.base import TensorSpec, plan_base, stream_base
from loaders.errors import CheckpointError

MTP = "model.layers.3.eh_proj.weight"


def load(path: Path, expected: dict[str, TensorSpec], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(stream_base(path, expected, dtype, ignored_layers_from=3))


def refusal(path: Path, expected: dict[str, TensorSpec]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        stream_base(path, expected, torch.float32, ignored_layers_from=3)
    return caught.value


def test_a_sharded_transformers_checkpoint_streams_back_exactly_and_in_file_order(tiny: TinyModel) -> None:
    assert len(list(tiny.path.glob("*.safetensors"))) > 2
    names, seen = [], {}
    for name, tensor in stream_base(tiny.path, tiny.expected, torch.float32, ignored_layers_from=3):
        names.append(name)
        seen[name] = tensor
    assert len(names) == len(set(names))
    assert seen.keys() == tiny.tensors.keys()
    assert all(torch.equal(seen[name], tensor) for name, tensor in tiny.tensors.items())
    weight_map = json.loads((tiny.path / "model.safetensors.index.json").read_text())["weight_map"]
    shards = [weight_map[name] for name in names]
    assert shards == sorted(shards)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_converted_but_the_correction_bias_stays_float32(
    tiny: TinyModel, tmp_path: Path, stored: torch.dtype
) -> None:
    tensors = {n: t if "correction_bias" in n else t.to(stored) for n, t in tiny.tensors.items()}
    loaded = load(write_model(tmp_path, [tensors]), tiny.expected, torch.bfloat16)
    for name, tensor in tensors.items():
        is_bias = name.endswith("e_score_correction_bias")
        assert torch.equal(loaded[name], tensor if is_bias else tensor.to(torch.bfloat16)), name


def test_prediction_layers_and_inverse_frequencies_are_skipped_and_reported(tiny: TinyModel, tmp_path: Path) -> None:
    extra = {MTP: torch.ones(2, 2), "model.layers.3.mlp.gate.weight": torch.ones(2, 2)}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    plan = plan_base(write_model(tmp_path, [tiny.tensors, extra]), tiny.expected, ignored_layers_from=3)
    assert dict(plan.report.skipped).keys() == {"model.layers.3.*", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert "2 tensors of a multi-token-prediction layer" in dict(plan.report.skipped)["model.layers.3.*"]
    assert plan.report.shards == 2
    assert plan.report.num_bytes == sum(tensor.nbytes for tensor in tiny.tensors.values())
    assert dict(plan.stream(torch.float32)).keys() == tiny.tensors.keys()


def test_progress_counts_every_byte_and_a_filter_leaves_tensors_unread(tiny: TinyModel) -> None:
    plan = plan_base(tiny.path, tiny.expected, ignored_layers_from=3)
    seen: list[tuple[int, int]] = []
    list(plan.stream(torch.float32, lambda done, total: seen.append((done, total))))
    assert seen[-1] == (plan.report.num_bytes, plan.report.num_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    experts = [name for name, _ in plan.stream(torch.float32, wanted=lambda name: ".experts.1." in name)]
    assert len(experts) == 6


@pytest.mark.parametrize("form", ["language_model.{}", "model.language_model.{}"])
def test_the_text_part_of_a_multimodal_checkpoint_loads_under_plain_names(
    tiny: TinyModel, tmp_path: Path, form: str
) -> None:
    def stored_name(name: str) -> str:
        inner = name.removeprefix("model.") if form.startswith("model.") else name
        return "lm_head.weight" if inner == "lm_head.weight" and form.startswith("model.") else form.format(inner)

    tensors = {stored_name(name): tensor for name, tensor in tiny.tensors.items()}
    tensors["vision_tower.patch_embed.weight"] = torch.ones(3)
    path = write_model(tmp_path, [tensors])
    loaded = load(path, tiny.expected)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny.tensors.items())
    report = plan_base(path, tiny.expected, ignored_layers_from=3).report
    assert report.skipped == (("vision_tower.patch_embed.weight", "not part of the text model"),)


def test_all_missing_unexpected_and_misshaped_tensors_are_named_at_once(tiny: TinyModel, tmp_path: Path) -> None:
    tensors = dict(tiny.tensors)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.extra.weight"] = torch.ones(2)
    tensors["model.layers.2.self_attn.o_proj.weight"] = torch.ones(48, 7)
    error = refusal(write_model(tmp_path, [tensors]), tiny.expected)
    assert sorted(error.problems) == [
        "model.layers.1.extra.weight: unexpected tensor [2]",
        "model.layers.2.self_attn.o_proj.weight: shape [48, 7] on disk, expected [48, 24]",
        "model.norm.weight: missing, expected [48]",
    ]
    assert all(problem in str(error) for problem in error.problems)


def test_a_long_list_of_problems_is_kept_whole_but_printed_short(tmp_path: Path) -> None:
    path = write_model(tmp_path, [{"model.norm.weight": torch.ones(2)}])
    expected = {f"model.layers.0.a{n}.weight": TensorSpec((1,)) for n in range(500)}
    error = refusal(path, expected | {"model.norm.weight": TensorSpec((2,))})
    assert len(error.problems) == 500
    assert "... and 480 more problems" in str(error)
    assert len(str(error).splitlines()) == 22


def drop(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def test_the_likely_cause_is_named(tiny: TinyModel, tmp_path: Path) -> None:
    base, expected = tiny.tensors, tiny.expected
    wide = {**base, "model.embed_tokens.weight": torch.ones(96, 2048), "model.norm.weight": torch.ones(2048)}
    fused = {**drop(base, ".mlp.experts."), "model.layers.1.mlp.experts.gate_up_proj": torch.ones(4, 32, 48)}
    no_q_lora = {**drop(base, ".q_a_"), "model.layers.0.self_attn.q_proj.weight": torch.ones(48, 48)}
    packed = {**base, "model.layers.1.mlp.experts.0.up_proj.weight_packed": torch.ones(2)}
    more_experts = {**base, "model.layers.1.mlp.experts.4.up_proj.weight": torch.ones(16, 48)}
    cases = [
        (wide, "hidden size 2048 (V2-Lite or Moonlight), config.json says 48"),
        (fused, "experts stored fused"),
        (no_q_lora, "weights without q_lora_rank (shape of V2-Lite or Moonlight)"),
        (packed, "quantised by a method that is not supported"),
        (more_experts, "fewer routed experts (n_routed_experts)"),
        (drop(base, "lm_head"), "tied weights are not supported"),
        (drop(base, "e_score_correction_bias"), "softmax router"),
        (drop(base, "model.layers.2."), "more layers (num_hidden_layers)"),
    ]
    for number, (tensors, words) in enumerate(cases):
        headline = str(refusal(write_model(tmp_path / str(number), [tensors]), expected)).splitlines()[0]
        assert "likely cause" in headline
        assert words in headline


def test_a_missing_or_truncated_shard_is_named_as_an_unfinished_download(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(tiny.path, path)
    shards = sorted(path.glob("*.safetensors"))
    os.truncate(shards[0], shards[0].stat().st_size - 10)
    shards[1].unlink()
    error = refusal(path, tiny.expected)
    assert "likely cause: an unfinished or damaged download" in str(error).splitlines()[0]
    assert any(shards[0].name in problem and "truncated" in problem for problem in error.problems)
    assert any(shards[1].name in problem and "not in the directory" in problem for problem in error.problems)
    assert any("missing, expected" in problem for problem in error.problems)


def test_an_index_must_tell_the_truth_and_stay_in_its_directory(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(tiny.path, path)
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["model.ghost.weight"] = weight_map["model.norm.weight"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert any("model.ghost.weight" in problem for problem in refusal(path, tiny.expected).problems)
    weight_map["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "must be the name of a file beside the index" in str(refusal(path, tiny.expected))


def test_a_directory_without_readable_weights_says_what_it_holds_instead(tiny: TinyModel, tmp_path: Path) -> None:
    assert "not a directory" in str(refusal(tmp_path / "nowhere", tiny.expected))
    assert "no safetensors files at all" in str(refusal(tmp_path, tiny.expected))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "only safetensors are read" in str(refusal(tmp_path, tiny.expected))
    shutil.copy(next(tiny.path.glob("*.safetensors")), tmp_path)
    assert "no index" in str(refusal(tmp_path, tiny.expected))
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in str(refusal(tmp_path, tiny.expected))


@pytest.mark.parametrize(
    ("quantisation", "words"),
    [
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors' is not supported"),
        ({"quant_method": "gptq"}, "'gptq' is not supported"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size must be two positive integers"),
    ],
)
def test_other_quantisation_is_refused_by_name(
    tiny: TinyModel, tmp_path: Path, quantisation: dict[str, object], words: str
) -> None:
    path = write_model(tmp_path, [tiny.tensors], {"quantization_config": quantisation})
    assert words in str(refusal(path, tiny.expected))
    path = write_model(tmp_path, [tiny.tensors], {"text_config": {"quantization_config": quantisation}})
    assert words in str(refusal(path, tiny.expected))


def test_integer_weights_are_refused(tiny: TinyModel, tmp_path: Path) -> None:
    tensors = {**tiny.tensors, "model.norm.weight": torch.ones(48, dtype=torch.int8)}
    assert "stored as I8" in str(refusal(write_model(tmp_path, [tensors]), tiny.expected))


PEAK_SCRIPT = """
import sys, torch
from pathlib import Path
from loaders.base import TensorSpec, plan_base

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(1)
rows, cols, count = map(int, sys.argv[2:5])
expected = {f"t{n}.weight": TensorSpec((rows, cols)) for n in range(count)}
plan = plan_base(Path(sys.argv[1]), expected, ignored_layers_from=99)
torch.ones(8).bfloat16().float()
before = kib("VmRSS")
model = dict(plan.stream(torch.bfloat16))
model_kib = sum(tensor.nbytes for tensor in model.values()) / 1024
print((kib("VmHWM") - before) / model_kib)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")
@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e4m3fn])
def test_the_peak_of_memory_stays_within_1_2_times_the_models_bytes(tmp_path: Path, stored: torch.dtype) -> None:
    rows, cols, count = 1024, 1280, 80  # 210 MB in bf16
    tensors: dict[str, Tensor] = {}
    for n in range(count):
        tensors[f"t{n}.weight"] = torch.full((rows, cols), 0.5, dtype=torch.bfloat16).to(stored)
        if stored is torch.float8_e4m3fn:
            tensors[f"t{n}.weight_scale_inv"] = torch.ones(rows // 128, cols // 128)
    names = list(tensors)
    half = len(names) // 2
    write_model(tmp_path, [{n: tensors[n] for n in names[:half]}, {n: tensors[n] for n in names[half:]}])
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, str(tmp_path), str(rows), str(cols), str(count)],
        capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    print(f"peak {float(result.stdout):.3f} x model bytes from {stored}")
    assert float(result.stdout) <= 1.2
