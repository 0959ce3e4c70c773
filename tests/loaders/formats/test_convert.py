"""`graft convert` writes every layout as the standard file, whole or not at all, and says what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from loader_builders import TinyModel, assert_same_deltas, our_deltas, write_adapter

from loaders.adapter import load_adapter
from runtime.cli import main
from tests.loaders.formats import megatron_shards
from tests.loaders.formats.layouts import ALPHA, LAYOUTS, RANK, TARGETS, flat, per_expert, tinker
from tests.loaders.formats.test_replacement_experts import weights, write


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["convert", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_converted_adapter_is_the_standard_file_of_the_same_weights(
    tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    written = LAYOUTS[name]()
    source = write_adapter(tmp_path / "in", written.tensors, r=RANK, lora_alpha=ALPHA, **written.config)
    status, printed, _ = run(capsys, source, "--base", tiny.path, "--output", tmp_path / "out")
    assert status == 0
    assert "evidence   " in printed
    converted = load_adapter(tmp_path / "out", TARGETS)
    assert converted.layout.startswith("PEFT per-expert 2-D factors")
    assert_same_deltas(our_deltas(converted), written.deltas, 1e-4)


def test_the_folder_is_replaced_at_once_and_left_alone_by_a_failure(
    tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_adapter(tmp_path / "good", tinker().tensors, r=RANK, lora_alpha=ALPHA)
    bad = write_adapter(tmp_path / "bad", flat(is_swapped=False, is_expert_major=True).tensors, r=RANK)
    assert run(capsys, good, "--base", tiny.path, "--output", tmp_path / "out")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    status, _, problems = run(capsys, bad, "--base", tiny.path, "--output", tmp_path / "out")
    assert status == 1
    assert "graft convert --format-hint {peft,unsloth}" in problems
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert run(capsys, bad, "--base", tiny.path, "--output", tmp_path / "out", "--format-hint", "unsloth")[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} != before


def test_shards_need_rank_and_alpha(tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for name, value in {"HIDDEN": 48, "INTERMEDIATE": 16, "Q_A": 24, "KV_A": 24, "V_OUT": 24, "LAYERS": 3}.items():
        monkeypatch.setattr(megatron_shards, name, value)
    made = megatron_shards.whole()
    made.factors = {name: factor for name, factor in made.factors.items() if ".mlp." not in name or ".weight" in name}
    made.factors = {name: factor for name, factor in made.factors.items() if "linear_fc" not in name}
    deltas = {name: delta for name, delta in made.deltas.items() if "experts." in name or "self_attn" in name}
    deltas = {name: delta for name, delta in deltas.items() if "shared_experts" not in name}
    source = megatron_shards.save_shards(tmp_path / "in", made, stages=(2, 1), ep=2)
    arguments = (source, "--base", tiny.path, "--output", tmp_path / "out")
    assert "do not state rank and alpha" in run(capsys, *arguments)[2]
    assert "--rank 0 is not allowed" in run(capsys, *arguments, "--rank", 0, "--alpha", 6)[2]
    assert "--format-hint is for flat stacks" in run(capsys, *arguments, "--rank", 2, "--alpha", 6, "--format-hint",
                                                     "peft")[2]  # fmt: skip
    assert not (tmp_path / "out").exists()
    status, printed, _ = run(capsys, *arguments, "--rank", 2, "--alpha", 6)
    assert status == 0
    assert "mp_rank_* folders of tp 1, pp 2, ep 2" in printed
    assert_same_deltas(our_deltas(load_adapter(tmp_path / "out", tiny.targets)), deltas, 1e-4)


def test_rank_and_alpha_of_an_adapter_that_states_them_are_refused(
    tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_adapter(tmp_path / "in", per_expert().tensors)
    problem = run(capsys, source, "--base", tiny.path, "--output", tmp_path / "out", "--rank", 2)[2]
    assert "--rank and --alpha are for MindSpeed-LLM shards" in problem


def test_full_weights_of_experts_are_no_lora(
    tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "esft", weights(0, 2))
    assert "which no LoRA file can express" in run(capsys, source, "--base", tiny.path, "--output", tmp_path / "o")[2]
    assert main(["inspect", str(source), "--base", str(tiny.path)]) == 0
    assert "ESFT, full weights of chosen experts" in capsys.readouterr().out


def test_the_stored_dtype_is_kept(tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {key: tensor.bfloat16() for key, tensor in tinker().tensors.items()}
    source = write_adapter(tmp_path / "in", tensors, r=RANK, lora_alpha=ALPHA)
    run(capsys, source, "--base", tiny.path, "--output", tmp_path / "out")
    head = load_adapter(tmp_path / "out", TARGETS).linears["lm_head"]
    assert str(head.a.dtype) == "torch.bfloat16"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
