"""The training benchmark: its sums, what it says where a way fails, and that PEFT's side trains what is meant."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import train_peft_side, train_vs_peft
from benchmarks.make_model import LORA_RANK, TINY, base_dir, write_base
from benchmarks.train_side import SideResult, parser, print_result, token_ids
from benchmarks.train_vs_peft import Comparison, Trial, Way, as_text, compare, summarise

GIB = 2**30
NOT_TRIED = Trial(None, "not tried: far slower or failed at the smaller batch")


def side(name: str, seconds: list[float], peak_gib: float) -> SideResult:
    peak = int(peak_gib * GIB)
    return SideResult(name, "bfloat16", 4, 512, seconds, [9.0, 8.0], peak, peak // 2, 1000)


def test_the_median_step_of_all_processes_counts() -> None:
    runs = {
        "peft": [side("peft", [8.0, 9.0], 6.0), side("peft", [40.0], 6.0)],
        "graft": [side("graft", [2.0, 3.0], 3.0), side("graft", [3.0], 3.0)],
    }
    report = summarise([Comparison(4, {"peft": {"bfloat16, eager": Trial(None, "given up after 45 s")}}, runs)])
    batch = report["batches"]["4"]
    assert batch["sides"]["graft"]["tokens_per_second"] == 4 * 512 / 3.0
    assert (batch["speed_ratio"], batch["memory_ratio"], batch["training_memory_ratio"]) == (3.0, 0.5, 0.5)
    text = as_text(report | {"model": "tiny", "machine": {"threads": 1}})
    assert "3.00x   asked >= 2.0x" in text
    assert "0.50    asked <= 0.8" in text
    assert "bfloat16, eager: given up after 45 s" in text, "why it has no time"
    assert batch["trials"] == {"peft": {"bfloat16, eager": {"seconds": None, "why": "given up after 45 s"}}}


def test_a_result_survives_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    result = side("peft", [1.0], 1.0)
    print_result(result)
    assert SideResult.parse(capsys.readouterr().out.splitlines()[-1]) == result


def test_slow_and_broken_ways_are_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds = {"grouped_mm": 1.0, "eager": 5.0}

    def run(model: Path, batch: int, way: Way, *_: object) -> SideResult | str:
        return side("peft", [seconds[way.experts]], 1.0) if way.experts in seconds else "failed: no memory"

    monkeypatch.setattr(train_vs_peft, "_run", run)
    ways = {"peft": [Way("peft", "float32", experts) for experts in ("batched_mm", "eager", "grouped_mm")]}
    arguments = argparse.Namespace(max_seconds=10.0, rounds=2, steps=1)
    comparison, promising = compare(tmp_path, 1, ways, arguments)
    assert comparison.trials["peft"] == {
        "float32, batched_mm": Trial(None, "failed: no memory"),
        "float32, eager": Trial(5.0),
        "float32, grouped_mm": Trial(1.0),
    } | {f"bfloat16, {experts}": NOT_TRIED for experts in ("grouped_mm", "eager", "batched_mm")}
    assert [run.seconds_per_step for run in comparison.runs["peft"]] == [[1.0], [1.0]]
    assert promising == {"peft": [Way("peft", "float32", "grouped_mm")]}


def test_a_side_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    arguments = argparse.Namespace(threads=1, length=8, max_gib=16.0)
    way = Way("absent", "float32")
    said = train_vs_peft._run(tmp_path, 1, way, arguments, 1, 60.0)
    assert said == f"failed: {sys.executable}: No module named benchmarks.train_absent_side"
    assert train_vs_peft._run(tmp_path, 1, way, arguments, 1, 0.001) == "given up after 0 s"


@pytest.mark.parametrize("side_name", ["peft", "graft"])
def test_either_side_fails_beyond_the_same_memory(tmp_path: Path, side_name: str) -> None:
    write_base(base_dir(tmp_path), TINY)
    arguments = argparse.Namespace(threads=1, length=32, max_gib=0.05)
    said = train_vs_peft._run(base_dir(tmp_path), 1, Way(side_name, "float32"), arguments, 1, 120.0)
    assert isinstance(said, str) and said.startswith("failed: "), said


def test_the_command_of_the_makefile_is_the_one_whose_numbers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """README: nine steps in three processes."""
    monkeypatch.setattr(sys, "argv", ["train_vs_peft"])
    arguments = train_vs_peft._parse()
    assert (arguments.rounds, arguments.steps, arguments.max_gib) == (3, 3, 16.0)


def test_pefts_side_trains_factors_of_rank_16_on_the_routed_experts(tmp_path: Path) -> None:
    write_base(base_dir(tmp_path), TINY)
    given = f"--model {base_dir(tmp_path)} --dtype float32 --batch 2 --steps 2 --threads 1 --length 32"
    arguments = parser(None).parse_args(given.split(), argparse.Namespace(experts="grouped_mm"))
    result = train_peft_side.measure(arguments)
    hidden, inner, layers = TINY["hidden_size"], TINY["moe_intermediate_size"], TINY["num_hidden_layers"] - 1
    per_expert = LORA_RANK * ((hidden + 2 * inner) + (inner + hidden))
    assert result.trainable_parameters == layers * TINY["n_routed_experts"] * per_expert
    assert (len(result.losses), len(result.seconds_per_step)) == (arguments.warmup + 2, 2)
    assert result.losses[0] == pytest.approx(_loss_of_base(arguments, 0), rel=1e-5)  # B is zero
    changes = [abs(loss - _loss_of_base(arguments, step)) for step, loss in enumerate(result.losses)]
    assert changes[2] > 1e-4


def _loss_of_base(arguments: argparse.Namespace, step: int) -> float:
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    ids = token_ids(arguments.model, step, arguments.batch, arguments.length)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
