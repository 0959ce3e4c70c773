"""PEFT on transformers 5 computes from exported files what the weights merged by hand compute."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loaders.adapter import load_adapter
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.export.adapter_files import ExportOptions, write_adapter
from tests.conftest import RecordNumber
from tests.oracle.adapters import merge_by_hand
from tests.oracle.base_models import Oracle, logits
from tests.oracle.shapes import SHAPES, V2_LITE, V3, Shape
from tests.trainer.export.factors import Factors, always, differing, draw

FORMATS = ("per-expert", "peft-v5")


def largest_difference(oracle: Oracle, factors: Factors, folder: Path) -> tuple[float, float]:
    """(PEFT against merged by hand, merged by hand against the base), in logits.

    Both sides compute in float64: in float32 the order of the sums alone makes differences of 2e-5.
    """
    prompt = oracle.prompt(24)
    truth = logits(merge_by_hand(copy.deepcopy(oracle.model).double(), factors.deltas()), prompt)
    effect = (truth - logits(oracle.model, prompt)).abs().max().item()
    return (logits(load_with_peft(oracle, folder).double(), prompt) - truth).abs().max().item(), effect


def load_with_peft(oracle: Oracle, folder: Path) -> Any:
    """The base with the adapter; a key that PEFT misses or does not know is an error."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected) .*keys.*")
        return PeftModel.from_pretrained(copy.deepcopy(oracle.model), folder)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_kind_of_module_means_the_same_to_peft(
    oracle: Callable[[Shape], Oracle], tmp_path: Path, record_number: RecordNumber, shape: Shape, layout: str
) -> None:
    base = oracle(shape)
    targets = DeepseekConfig.from_dir(base.path).adapter_targets()
    factors = draw(targets)
    write_adapter(tmp_path / "x", factors.linears, factors.experts, targets, ExportOptions(layout, torch.float32))
    difference, effect = largest_difference(base, factors, tmp_path / "x")
    assert effect > 0.1
    record_number(f"PEFT's logits of a {layout} file, {shape.name}", difference, at_most=1e-5)


CASES: dict[str, dict[str, Any]] = {
    "ranks and scales differ": {"rank_and_scale": differing},
    "gate and up with an A of their own": {"shared_a": False},
    "experts alone": {"linears": ()},
    "attention of one layer": {"linears": ("model.layers.1.self_attn.o_proj",), "covers": lambda layer, expert: False},
    "shared and dense mlp alone": {
        "linears": (
            *(f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")),
            *(f"model.layers.{layer}.mlp.shared_experts.up_proj" for layer in (1, 2)),
        ),
        "covers": lambda layer, expert: False,
    },
    "shared mlp of one layer, and experts": {"linears": ("model.layers.2.mlp.shared_experts.down_proj",)},
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [V3, V2_LITE], ids=lambda shape: shape.name)
def test_parts_of_a_model_mean_the_same_to_peft(
    oracle: Callable[[Shape], Oracle], tmp_path: Path, shape: Shape, layout: str, case: str
) -> None:
    base = oracle(shape)
    targets = DeepseekConfig.from_dir(base.path).adapter_targets()
    factors = draw(targets, **{"rank_and_scale": always} | CASES[case])
    write_adapter(tmp_path / "x", factors.linears, factors.experts, targets, ExportOptions(layout, torch.float32))
    difference, effect = largest_difference(base, factors, tmp_path / "x")
    assert effect > 0.01
    assert difference < 1e-5


def test_some_experts_are_enough_for_the_stacked_file_and_the_other_is_refused_by_peft(
    oracle: Callable[[Shape], Oracle], tmp_path: Path
) -> None:
    base = oracle(V3)
    targets = DeepseekConfig.from_dir(base.path).adapter_targets()
    factors = draw(targets, linears=(), covers=lambda layer, expert: layer == 2 and expert % 5 == 0)
    for layout in FORMATS:
        options = ExportOptions(layout, torch.float32)
        write_adapter(tmp_path / layout, factors.linears, factors.experts, targets, options)
        loaded = load_adapter(tmp_path / layout, targets)
        assert {layer: list(adapted) for layer, adapted in loaded.experts.items()} == {2: [0, 5, 10, 15]}
    difference, effect = largest_difference(base, factors, tmp_path / "peft-v5")
    assert effect > 0.01
    assert difference < 1e-5
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_with_peft(base, tmp_path / "per-expert")
