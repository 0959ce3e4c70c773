"""The doctor's checks with the Ascend back-end on the bench, at the demo's sizes and at those of DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from runtime.doctor import run
from runtime.doctor.cases import checks_at
from runtime.doctor.run import PASSED, Row, run_checks
from runtime.doctor.shapes import DEEPSEEK_V3, Shapes, demo_shapes
from runtime.doctor.training import check_training
from runtime.ops.npu.ops import NpuOps
from tests.npu import bench

CPU = torch.device("cpu")
# The sizes that operators have opinions on are attention's and the number of experts; the rest may be small here.
NARROW_V3 = replace(DEEPSEEK_V3.reduced(), expert_width=64, num_heads=4)


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(run, "NUM_SAMPLES", 1)
    monkeypatch.setattr(run, "MAX_CALLS", 1)
    yield


def rows_of(shapes: Shapes, *dtypes: torch.dtype) -> list[Row]:
    return list(run_checks(checks_at(shapes, dtypes), NpuOps(), CPU))


def test_every_check_passes_at_the_demos_sizes_and_says_which_operators_were_replaced() -> None:
    rows = rows_of(demo_shapes(), torch.bfloat16, torch.float32)
    assert {row.name: row.note for row in rows if row.status != PASSED} == {}
    replaced = {row.operation for row in rows if row.replaced}
    assert replaced == {"rotate_interleaved", "write_latents", "mla_decode", "attend_block", "decode_queries"}
    assert all(row.replaced for row in rows if row.operation == "mla_decode")


def test_every_check_passes_at_deepseek_v3s_sizes_without_a_replacement() -> None:
    before = bench.calls.copy()
    rows = rows_of(NARROW_V3, torch.bfloat16)
    assert {row.name: row.note for row in rows if row.status != PASSED} == {}
    assert [row.name for row in rows if row.replaced] == []
    ran = (bench.calls - before).keys()
    assert {"npu_grouped_matmul", "npu_moe_gating_top_k", "npu_interleave_rope", "npu_kv_rmsnorm_rope_cache"} <= ran
    assert "npu_mla_prolog_v3" in ran


def test_a_training_step_equals_the_reference() -> None:
    [finding] = check_training(NpuOps(), CPU, (torch.float32,))
    assert finding.status == PASSED, finding.note
