"""The checks of operations: each has one, a wrong or failing operation is found, and nothing ends the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from runtime.doctor import run
from runtime.doctor.cases import all_cases, all_checks, checks_at, operations
from runtime.doctor.run import FAILED, PASSED, SKIPPED, Row, run_checks
from runtime.doctor.shapes import DEEPSEEK_V3, demo_shapes
from runtime.ops.base import Ops
from runtime.ops.cpu import CpuOps
from tests.doctor.broken import RaisingNorm, SwappedSwiglu

CPU = torch.device("cpu")
FLOAT32 = (torch.float32,)


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(run, "NUM_SAMPLES", 1)
    monkeypatch.setattr(run, "MAX_CALLS", 1)
    yield


def rows_of(ops: Ops, max_bytes: int | None = None) -> list[Row]:
    return list(run_checks(checks_at(demo_shapes(), FLOAT32), ops, CPU, max_bytes))


def test_every_operation_of_the_table_that_computes_has_a_case() -> None:
    named = {name for case in all_cases() for name in (case.operation, *case.also)}
    assert named == set(operations())
    assert {"grouped_matmul", "lora_add_", "make_cache", "swiglu_backward"} <= named


def test_the_cases_call_every_operation_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, method: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return method(*args, **kwargs)

        return call

    ops = CpuOps()
    for name in operations():
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    rows = rows_of(ops)
    assert calls.keys() == set(operations())
    assert {row.status for row in rows} == {PASSED}


def test_a_wrong_operation_fails_its_own_checks_and_no_others() -> None:
    rows = rows_of(SwappedSwiglu())
    assert {row.operation for row in rows if row.status == FAILED} == {"swiglu"}
    failed = next(row for row in rows if row.status == FAILED)
    assert failed.error is not None and failed.bound is not None and failed.error > 100 * failed.bound


def test_an_operation_that_raises_becomes_its_row_and_the_run_goes_on() -> None:
    rows = rows_of(RaisingNorm())
    failed = [row for row in rows if row.status == FAILED]
    # `decode_queries` norms its query, which has a latent in the demo, by the same entry of the table.
    assert {row.operation for row in failed} == {"rms_norm", "decode_queries"}
    assert failed[0].note == "RuntimeError: aclnnRmsNorm failed, error code is 507015"
    assert next(row for row in rows if row.operation == "attention").status == PASSED


def test_a_result_that_is_not_a_number_fails() -> None:
    class Broken(CpuOps):
        def rms_norm(self, x_TN: torch.Tensor, weight_N: torch.Tensor, eps: float) -> torch.Tensor:
            y_TN = super().rms_norm(x_TN, weight_N, eps)
            y_TN[-1, -1] = float("nan")
            return y_TN

    failed = [row for row in rows_of(Broken()) if row.status == FAILED]
    assert [row.operation for row in failed] == ["rms_norm", "rms_norm", "decode_queries"]
    assert {row.error for row in failed} == {float("inf")}


def test_what_does_not_fit_is_skipped_with_the_bytes_that_it_needs() -> None:
    rows = rows_of(CpuOps(), max_bytes=2**20)
    skipped = [row for row in rows if row.status == SKIPPED]
    assert {row.status for row in rows} == {PASSED, SKIPPED}
    assert all(row.needed_bytes > 2**20 and f"{row.needed_bytes:,} bytes" in row.note for row in skipped)


def test_the_large_shapes_are_those_of_deepseek_v3_and_whole_unless_reduced() -> None:
    """A share of 16 experts of one MoE layer, gate and up: 16 x 7168 x 4096 numbers of 16 bits."""
    whole = {check.name: check for check in all_checks(CPU, "full")}
    assert not whole.keys() - {check.name for check in all_checks(torch.device("cuda"), "normal")}
    rows = list(run_checks([whole["grouped_matmul (decode, gate and up), deepseek-v3, bfloat16"]], CpuOps(), CPU, 1))
    assert rows[0].detail == "x [64, 7168], weight [16, 7168, 4096], 15 groups with rows"
    assert rows[0].needed_bytes > 2 * 16 * 7168 * 4096
    reduced = [check for check in all_checks(CPU, "normal") if check.shapes.name == "deepseek-v3"]
    assert all(check.shapes.num_local_experts == 4 and check.shapes.hidden == 7168 for check in reduced)


def test_the_reduced_shapes_pass_in_both_dtypes() -> None:
    """Narrower here than in a run, since this test is about the shapes' kinds and not about their sizes."""
    shapes = replace(DEEPSEEK_V3.reduced(), hidden=256, expert_width=64)
    rows = list(run_checks(checks_at(shapes, (torch.bfloat16, torch.float32)), CpuOps(), CPU))
    assert {row.status for row in rows} == {PASSED}
    assert all(row.seconds is not None and row.seconds > 0 for row in rows)
