"""One training step through Ascend's operators, on the bench: the CPU's loss and gradients."""

from __future__ import annotations

import pytest
import torch

from runtime.ops.cpu import CpuOps
from runtime.ops.npu.ops import NpuOps
from runtime.trainer.config import LoraSettings
from tests.conftest import RecordNumber
from tests.npu import bench
from tests.npu.models import OPERATOR_SIZES, V2_LITE_CHOICE, TinyBase, write_base
from tests.trainer.stages import gradients, make_batch, make_rows, make_stage

ROWS = make_rows([(30, 20, 14), (64,), (7, 40)])
ALL_LINEAR = LoraSettings(("all-linear", "lm_head"), rank=4, alpha=8.0)
EXPERTS = LoraSettings(("experts",), rank=8, alpha=16.0)


@pytest.fixture(scope="module", params=[{}, V2_LITE_CHOICE], ids=["V3", "V2-Lite"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return write_base(tmp_path_factory.mktemp("base") / "tiny", OPERATOR_SIZES | request.param)


@pytest.mark.parametrize("lora", [ALL_LINEAR, EXPERTS], ids=["all linear", "experts"])
@pytest.mark.parametrize("adapted", [None, (1, 4, 9)], ids=["all experts", "three experts"])
def test_gradients_of_a_step_equal_the_cpus(
    base: TinyBase, lora: LoraSettings, adapted: tuple[int, ...] | None, record_number: RecordNumber
) -> None:
    batch = make_batch(ROWS)
    expected_loss, expected = gradients(make_stage(base, lora, adapted=adapted, ops=CpuOps()), [batch])
    bench.calls.clear()
    loss, seen = gradients(make_stage(base, lora, adapted=adapted, ops=NpuOps()), [batch])
    print("\n" + "\n".join(f"  {name:40} {count:>6} runs" for name, count in bench.calls.most_common()))
    for name in ("npu_grouped_matmul", "npu_fusion_attention", "npu_fusion_attention_backward", "npu_swiglu_backward",
                 "npu_rotary_mul", "npu_rms_norm"):  # fmt: skip
        assert bench.calls[name] > 0, name
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert seen.keys() == expected.keys() and len(seen) > 0
    worst = max(((seen[name] - truth).norm() / truth.norm()).item() for name, truth in expected.items())
    record_number(f"gradients vs the CPU's, relative ({base.path.parent.name}, {lora.targets})", worst, at_most=1e-4)


def test_a_step_in_bfloat16_has_the_cpus_gradients_up_to_rounding(base: TinyBase) -> None:
    """Experts alone: their gradients are summed in float32 by the operator that adds to them."""
    batch = make_batch(ROWS)
    _, exact = gradients(make_stage(base, EXPERTS, ops=CpuOps()), [batch])
    bench.calls.clear()
    _, seen = gradients(make_stage(base, EXPERTS, ops=NpuOps(), dtype=torch.bfloat16), [batch])
    assert bench.calls["npu_grouped_matmul_add_"] > 0
    _, plain = gradients(make_stage(base, EXPERTS, ops=CpuOps(), dtype=torch.bfloat16), [batch])
    ours, cpus = (
        sum((each[name] - truth).norm().item() / truth.norm().item() for name, truth in exact.items())
        for each in (seen, plain)
    )
    assert ours < 1.25 * cpus


