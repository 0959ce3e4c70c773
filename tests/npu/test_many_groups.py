"""Products of more groups, or along more rows, than a launch of `npu_grouped_matmul` takes, against the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from runtime.ops import reference, told
from runtime.ops.npu import grouped
from runtime.ops.npu.ops import NpuOps
from tests.conftest import RecordNumber
from tests.npu import bench
from tests.npu.no_waiting import no_waiting

OPS, CPU = NpuOps(), torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
with_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    grouped.adds_in_place(torch.bfloat16, CPU)  # tried once in a process, which is a call
    bench.calls.clear()
    yield
    grouped.adds_in_place.cache_clear()


def _sparse_counts(num_groups: int) -> Tensor:
    """A few groups with rows, many without: idle ones, and busy ones, on both sides of the launches' borders."""
    counts = torch.zeros(num_groups, dtype=torch.int64)
    for border in range(1024, num_groups, 2048):
        counts[border - 3], counts[min(border + 2, num_groups - 1)] = 3, 2
    for border in range(2048, num_groups, 2048):
        counts[border - 1], counts[border] = 1, 4
    counts[min(500, num_groups - 1)] += 5
    return counts


@with_dtypes
@pytest.mark.parametrize("num_groups", [1025, 1026, 2048, 2049, 5000])
@pytest.mark.parametrize("idle", ["some", "first launch", "last launch"])
@pytest.mark.parametrize("is_view", [False, True], ids=["as it lies", "transposed view"])
def test_more_than_1024_groups_are_several_launches(
    dtype: torch.dtype, num_groups: int, idle: str, is_view: bool, record_number: RecordNumber
) -> None:
    torch.manual_seed(3)
    counts = _sparse_counts(num_groups)
    if idle != "some":
        counts[slice(0, 1024) if idle == "first launch" else slice((num_groups - 1) // 1024 * 1024, None)] = 0
        counts[num_groups - 1 if idle == "first launch" else 0] += 2
    num_rows, num_launches = int(counts.sum()), -(-num_groups // 1024)
    x = torch.randn(num_rows, 16).to(dtype)
    stored = (torch.randn(num_groups, *((8, 16) if is_view else (16, 8))) / 4).to(dtype)
    weight = (stored.transpose(1, 2) if is_view else stored)[:, None]
    with no_waiting():
        seen = OPS.grouped_matmul(x, weight, counts)
    assert bench.calls["npu_grouped_matmul"] == num_launches
    expected = reference.grouped_matmul(x.float(), weight.float(), counts)
    allowed = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(seen.float(), expected, atol=allowed, rtol=0)
    bench.calls.clear()
    y = torch.randn(num_rows, 8).to(dtype)
    with no_waiting():
        outer = OPS.grouped_outer(x, y, counts)
    assert bench.calls.total() == num_launches
    torch.testing.assert_close(outer, reference.grouped_outer(x, y, counts), atol=1e-4, rtol=1e-4)
    if (dtype, idle, is_view) == (torch.bfloat16, "some", False):
        record_number(f"launches of a base product of {num_groups} groups", num_launches)


def test_products_along_more_rows_than_an_inner_axis_takes_are_several_launches() -> None:
    """In float32; in 16 bits the rows are not an inner axis."""
    torch.manual_seed(4)
    counts = torch.tensor([65_000, 0, 535, 2_000, 0])
    x, y = torch.randn(int(counts.sum()), 2), torch.randn(int(counts.sum()), 3)
    with no_waiting():
        seen = OPS.grouped_outer(x, y, counts)
    assert bench.calls["npu_grouped_matmul"] == 2
    torch.testing.assert_close(seen, reference.grouped_outer(x, y, counts), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("lack", ["torch_npu", "the device"])
def test_where_the_adding_operator_is_missing_products_are_rounded_once_and_that_is_told_once(
    lack: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise RuntimeError("aclnnGroupedMatmulAdd not in libopapi.so\n[ERROR] and a trace")

    if lack == "torch_npu":
        monkeypatch.delattr(grouped.torch_npu, "npu_grouped_matmul_add_")
    else:
        monkeypatch.setattr(grouped.torch_npu, "npu_grouped_matmul_add_", missing)
    grouped.adds_in_place.cache_clear()
    told._told.clear()
    torch.manual_seed(5)
    counts = torch.tensor([3, 0, 9])
    x, y = torch.randn(12, 16).bfloat16(), torch.randn(12, 8).bfloat16()
    seen = [OPS.grouped_outer(x, y, counts) for _ in range(2)][1]
    assert seen.dtype is torch.float32 and bench.calls == {"npu_grouped_matmul": 2}
    expected = reference.grouped_outer(x, y, counts)
    torch.testing.assert_close(seen, expected, atol=2**-8 * expected.abs().max().item(), rtol=0)
    [message] = [record.getMessage() for record in caplog.records]
    assert "npu_grouped_matmul_add_ is replaced by npu_grouped_matmul, which rounds" in message
    assert "trace" not in message
