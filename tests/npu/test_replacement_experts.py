"""ESFT adapters through Ascend's operators, on the bench: their experts are groups of the base's own products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.ops.base import Ops
from runtime.ops.cpu import CpuOps
from runtime.ops.npu import grouped
from runtime.ops.npu.ops import NpuOps
from tests.conftest import RecordNumber
from tests.npu import bench
from tests.npu.models import OPERATOR_SIZES, TinyBase, engine_with, feed, write_base
from tests.npu.no_waiting import no_waiting
from tests.oracle.adapters import KINDS, AdapterRecipe, write_adapter
from tests.oracle.replacement_experts import moe_layers, write_replacement

HALF = torch.bfloat16
ROOM = 5
NUM_STEPS = 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return write_base(tmp_path_factory.mktemp("base") / "operator-sizes", OPERATOR_SIZES)


@pytest.fixture(scope="module")
def adapters(base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """In the order of their slots: LoRA, ESFT, LoRA on the last experts, ESFT in one layer."""
    folder = tmp_path_factory.mktemp("adapters")
    layers = moe_layers(base.path)
    last = AdapterRecipe(
        ("routed_experts",), lora_rank=16, seed=2, covers=lambda layer, expert: expert > 11, dtype=HALF
    )
    return [
        write_adapter(base.path, folder / "lora", AdapterRecipe(KINDS, seed=1, dtype=HALF)).path,
        write_replacement(base.path, folder / "esft", {n: [n, 5, 15] for n in layers}, dtype=HALF).path,
        write_adapter(base.path, folder / "last", last).path,
        write_replacement(base.path, folder / "esft-one", {layers[-1]: [0, 5]}, seed=9, dtype=HALF).path,
    ]


def _fed(ops: Ops, base: TinyBase, adapters: list[Path], dtype: str, slots: list[int]) -> Tensor:
    with engine_with(ops, base.path, adapters, dtype, replacement_experts=ROOM) as driver:
        return feed(driver.engine.runner, [7, 45, 30, 61, 20, 33][: len(slots)], slots, NUM_STEPS)


def test_a_mixed_batch_gives_the_references_logits(
    base: TinyBase, adapters: list[Path], record_number: RecordNumber
) -> None:
    """What lies beyond a group list is NaN on the bench, so rows that a list forgets would show."""
    slots = [-1, 0, 1, 1, 2, 3]
    bench.calls.clear()
    seen = _fed(NpuOps(), base, adapters, "float32", slots)
    assert bench.calls["npu_grouped_matmul"] > 0 and bench.calls["npu_moe_init_routing_v2"] > 0
    expected = _fed(CpuOps(), base, adapters, "float32", slots)
    largest = (seen - expected).abs().max().item()
    record_number("ESFT beside LoRA and the base in float32, logits vs the CPU's", largest, at_most=1e-4)
    base_only = _fed(CpuOps(), base, [], "float32", [-1] * len(slots))
    for place, slot in enumerate(slots):
        assert slot < 0 or (expected - base_only)[:, place].abs().max() > 0.05


def test_no_product_is_launched_for_the_experts_that_adapters_bring(base: TinyBase, adapters: list[Path]) -> None:
    counts = []
    for slots in ([-1, -1], [1, 3]):
        bench.calls.clear()
        _fed(NpuOps(), base, adapters, "bfloat16", slots)
        counts.append(bench.calls["npu_grouped_matmul"])
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_step_waits_for_the_device(base: TinyBase, adapters: list[Path], dtype: str) -> None:
    with engine_with(NpuOps(), base.path, adapters, dtype, replacement_experts=ROOM) as driver:
        runner, seen = driver.engine.runner, []
        plain = runner.model.forward

        def watched(*args: object) -> object:
            with no_waiting() as mode:
                result = plain(*args)
            seen.append(mode.num_seen)
            return result

        runner.model.forward = watched
        feed(runner, [25, 1, 19, 44, 1], [-1, 0, 1, 2, 3], num_steps=4)
    assert len(seen) == 4 and min(seen) > 0


def test_more_groups_than_a_launch_takes_are_more_launches(
    base: TinyBase, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, record_number: RecordNumber
) -> None:
    """The base's 16 experts and 5 spare ones, by launches of 8."""
    slots = [-1, 0, 1, 1, 2, 3]
    expected = _fed(CpuOps(), base, adapters, "float32", slots)
    monkeypatch.setattr(grouped, "MAX_GROUPS", 8)
    largest = (_fed(NpuOps(), base, adapters, "float32", slots) - expected).abs().max().item()
    record_number("ESFT in launches of 8 groups, logits vs the CPU's", largest, at_most=1e-4)
