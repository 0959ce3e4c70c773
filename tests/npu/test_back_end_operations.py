"""Every operation of the table through Ascend's operators, on the bench, against its plain PyTorch reference."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from runtime.ops import reference, reference_routing, told
from runtime.ops.latent_cache import DecodeContext, LatentCache
from runtime.ops.lora_rows import LoraRows
from runtime.ops.npu.ops import NpuOps
from runtime.ops.rotation import Rotation
from runtime.ops.routing import RoutingRule
from tests.npu import bench
from tests.npu.no_waiting import no_waiting

OPS = NpuOps()
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
with_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
V3 = RoutingRule(8, num_groups=8, num_kept_groups=4, scale=2.5)
V2 = RoutingRule(6, scoring="softmax", renormalise=False, scale=16.0)
RULES = {
    "V3": (V3, 256),
    "Moonlight": (replace(V3, num_chosen=6, num_groups=1, num_kept_groups=1), 64),
    "V2-Lite": (V2, 64),
    "V2": (replace(V2, num_groups=8, num_kept_groups=3, group_score="best", masked=0.0), 160),
}


@pytest.fixture(autouse=True)
def counted() -> None:
    bench.calls.clear()
    told._told.clear()


def _close(seen: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of the largest number: rounding grows with what is summed."""
    allowed = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(seen.float(), expected.float(), atol=allowed, rtol=0)


@with_dtypes
@pytest.mark.parametrize("counts", [[1, 0, 2, 0, 1], [40, 0, 17, 3, 8], [0, 0, 5], [7], [0, 0]], ids=str)
@pytest.mark.parametrize("is_view", [False, True], ids=["as it lies", "transposed view"])
def test_grouped_products(dtype: torch.dtype, counts: list[int], is_view: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 48).to(dtype)
    stored = (torch.randn(len(counts), *((32, 48) if is_view else (48, 32))) / 7).to(dtype)
    weight = (stored.transpose(1, 2) if is_view else stored)[:, None]
    seen = OPS.grouped_matmul(x, weight, torch.tensor(counts))
    assert seen.dtype is dtype
    assert seen.shape == (len(x), 32)
    if len(x):
        _close(seen, reference.grouped_matmul(x.float(), weight.float(), torch.tensor(counts)), dtype)
    y = torch.randn(sum(counts), 32).to(dtype)
    added = y.clone()
    OPS.grouped_matmul_add_(added, x, weight, torch.tensor(counts))
    torch.testing.assert_close(added, y + seen)


@with_dtypes
@pytest.mark.parametrize("counts", [[1, 0, 2, 0, 1], [40, 0, 17, 3, 8], [7], [0, 0]], ids=str)
def test_products_along_rows_are_float32_and_zero_for_idle_groups(dtype: torch.dtype, counts: list[int]) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(sum(counts), 24).to(dtype), torch.randn(sum(counts), 40).to(dtype)
    seen = OPS.grouped_outer(x, y, torch.tensor(counts))
    assert seen.dtype is torch.float32
    torch.testing.assert_close(seen, reference.grouped_outer(x, y, torch.tensor(counts)), atol=1e-4, rtol=1e-4)


def test_sizes_beyond_the_operator_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"npu_grouped_matmul: \d+ inputs"):
        OPS.grouped_matmul(torch.zeros(1, 65_536), torch.zeros(2, 1, 65_536, 8), torch.tensor([1, 0]))


@with_dtypes
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("num_pages", [1, 40, 1024, 1025, 2600])
def test_lora_of_any_number_of_pages_is_added_without_waiting(dtype: torch.dtype, parts: int, num_pages: int) -> None:
    """Rows of few pages in many, rows without a page at both ends and between; others' products overflow."""
    torch.manual_seed(2)
    pages = torch.randint(0, num_pages, (60,)).sort().values
    pages[torch.tensor([0, 1, 20, 59])] = -1
    a = (torch.randn(num_pages, 16 * parts, 32) / 6).to(dtype)
    a[pages[30]] = 1e37
    bs = [(torch.randn(num_pages, 16, 24) / 3).to(dtype) for _ in range(parts)]
    x, y = torch.randn(60, 32).to(dtype), torch.randn(60, 24 * parts).to(dtype)
    a_PKR = a.transpose(1, 2)
    rows = LoraRows.of_pages(pages, num_pages)
    expected = y.float().clone()
    reference.lora_add_(expected, x.float(), a_PKR.float(), [b.float() for b in bs], rows)
    seen = y.clone()
    with no_waiting():
        OPS.lora_add_(seen, x, a_PKR, bs, rows)
    others = pages != pages[30]
    _close(seen[others], expected[others], dtype)
    assert torch.equal(seen[pages < 0], y[pages < 0])
    assert bench.calls["npu_grouped_matmul"] == (1 + parts) * -(-num_pages // 1024)


@pytest.mark.parametrize("num_pages", [1024, 1025, 2600])
def test_rows_that_all_have_pages_are_told_apart_by_their_places_alone(num_pages: int) -> None:
    torch.manual_seed(4)
    pages = torch.randint(0, num_pages, (60,)).sort().values
    a, b = torch.randn(num_pages, 16, 32) / 6, torch.randn(num_pages, 16, 24) / 3
    a[pages[30]] = 1e37
    x, y = torch.randn(60, 32), torch.randn(60, 24)
    known = LoraRows.of_pages(pages, num_pages, all_have_pages=True)

    def find_pages() -> Tensor:
        raise AssertionError("a row's page was asked for")

    expected, seen = y.clone(), y.clone()
    reference.lora_add_(expected, x, a.transpose(1, 2), [b], known)
    rows = LoraRows(find_pages, lambda: known.ends_P, num_pages, all_have_pages=True)
    OPS.lora_add_(seen, x, a.transpose(1, 2), [b], rows)
    others = pages != pages[30]
    torch.testing.assert_close(seen[others], expected[others])


def test_rows_that_all_have_pages_and_pools_without_pages() -> None:
    x, y = torch.ones(5, 32), torch.zeros(5, 16)
    a, b = torch.full((3, 16, 32), 0.25).transpose(1, 2), torch.full((3, 16, 16), 0.5)
    OPS.lora_add_(y, x, a, (b,), LoraRows.of_one_page(1, 5, 3, CPU))
    assert torch.equal(y, torch.full((5, 16), 64.0))
    OPS.lora_add_(y, x, a[:0], (b[:0],), LoraRows.of_pages(torch.full((5,), -1), 0))
    OPS.lora_add_(y[:0], x[:0], a, (b,), LoraRows.of_pages(torch.zeros(0, dtype=torch.int64), 3))
    assert torch.equal(y, torch.full((5, 16), 64.0))


@pytest.mark.parametrize(("rule", "num_experts"), RULES.values(), ids=RULES)
def test_the_router_of_every_family_is_one_operator(rule: RoutingRule, num_experts: int) -> None:
    torch.manual_seed(3)
    logits = torch.randn(200, num_experts)
    bias = torch.randn(num_experts) / 10 if rule.scoring == "sigmoid" else None
    weights, experts = OPS.choose_experts(logits, bias, rule)
    assert bench.calls["npu_moe_gating_top_k"] == 1 and weights.dtype is torch.float32
    expected_weights, expected = reference_routing.choose_experts(logits, bias, rule)
    by_expert, order = experts.long().sort(1)
    expected_by_expert, expected_order = expected.sort(1)
    assert torch.equal(by_expert, expected_by_expert)
    torch.testing.assert_close(weights.gather(1, order), expected_weights.gather(1, expected_order))


@pytest.mark.parametrize(
    ("rule", "num_experts", "reason"),
    [
        (replace(V3, renormalise=False), 256, "sigmoid scores without renormalised weights"),
        (replace(V3, num_groups=128, num_kept_groups=64), 256, "2 experts a group"),
        (replace(V2, num_groups=128, num_kept_groups=64, group_score="best"), 384, "384 experts, 4096"),
    ],
)
def test_a_choice_that_the_operator_cannot_express_is_the_references_and_told_once(
    rule: RoutingRule, num_experts: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    logits = torch.randn(9, num_experts)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            weights, experts = OPS.choose_experts(logits, None, rule)
    expected = reference_routing.choose_experts(logits, None, rule)
    assert torch.equal(weights, expected[0]) and torch.equal(experts, expected[1])
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    assert not bench.calls


@with_dtypes
@pytest.mark.parametrize("num_keys", [5, 10_240, 10_241])
def test_rows_are_sorted_and_combined_without_waiting(dtype: torch.dtype, num_keys: int) -> None:
    torch.manual_seed(4)
    x, keys = torch.randn(30, 12).to(dtype), torch.randint(0, num_keys, (30, 4))
    weights = torch.rand(30, 4)
    with no_waiting():
        rows = OPS.sort_rows(x, keys, num_keys)
        combined = OPS.combine_experts(rows.x_MH * 2, rows, weights)
        order = rows.order_M
    expected = reference_routing.sort_rows(x, keys, num_keys)
    assert torch.equal(order, expected.order_M) and torch.equal(rows.places_M.long(), expected.places_M)
    assert torch.equal(rows.x_MH, expected.x_MH) and torch.equal(rows.counts_G, expected.counts_G)
    assert bench.calls["npu_moe_init_routing_v2"] == (num_keys <= 10_240)
    _close(combined, reference.combine_experts(expected.x_MH.float() * 2, expected, weights), dtype)


@with_dtypes
def test_norms_and_the_activation(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    x, residual, weight = torch.randn(9, 64).to(dtype), torch.randn(9, 64).to(dtype), torch.rand(64).to(dtype)
    _close(OPS.rms_norm(x, weight, 1e-5), reference.rms_norm(x.float(), weight.float(), 1e-5), dtype)
    for seen, expected in zip(
        OPS.add_rms_norm(x, residual, weight, 1e-5),
        reference.add_rms_norm(x.float(), residual.float(), weight.float(), 1e-5),
        strict=True,
    ):
        _close(seen, expected, dtype)
    _close(OPS.swiglu(x), reference.swiglu(x.float()), dtype)
    grad, before = torch.randn(9, 32).to(dtype), bench.calls["npu_swiglu"]
    seen = OPS.swiglu_backward(x, grad)
    assert bench.calls["npu_swiglu_backward"] == 1 and bench.calls["npu_swiglu"] == before
    _close(seen, reference.swiglu_backward(x.float(), grad.float()), dtype)


@with_dtypes
@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize("num_heads", [None, 3])
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_rotation_and_its_gradient(
    dtype: torch.dtype, width: int, num_heads: int | None, wants_gradient: bool
) -> None:
    torch.manual_seed(6)
    x = torch.randn((7, width) if num_heads is None else (7, num_heads, width)).to(dtype).requires_grad_(wants_gradient)
    angles = torch.rand(7, width // 2)
    rotation = Rotation(angles.cos(), angles.sin())
    seen = OPS.rotate_interleaved(x, rotation)
    expected = reference.rotate_interleaved(x.float(), rotation)
    _close(seen.detach(), expected.detach(), dtype)
    operator = "npu_interleave_rope" if dtype is torch.bfloat16 and not wants_gradient else "npu_rotary_mul"
    assert bench.calls[operator] == (width == 64)
    if wants_gradient:
        grads = [torch.autograd.grad(out.float().square().sum(), x, retain_graph=True)[0] for out in (seen, expected)]
        _close(grads[0], grads[1], dtype)


def _cache(widths: tuple[int, int], block_tokens: int, dtype: torch.dtype) -> LatentCache:
    cache = OPS.make_cache(8 * block_tokens, block_tokens, widths, dtype, CPU)
    for part in cache.tensors:
        part.copy_(torch.randn(part.shape))
    return cache


@with_dtypes
@pytest.mark.parametrize("widths", [(512, 64), (96, 32)], ids=str)
def test_latents_are_written_into_their_slots_alone(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    torch.manual_seed(7)
    cache = _cache(widths, 16, dtype)
    before = [part.clone() for part in cache.tensors]
    kv, weight = torch.randn(70, sum(widths)).to(dtype), torch.rand(widths[0]).to(dtype)
    angles = torch.rand(70, widths[1] // 2)
    rotation, slots = Rotation(angles.cos(), angles.sin()), torch.randperm(128)[:70]
    with no_waiting():
        OPS.write_latents(cache, kv, weight, 1e-6, rotation, slots)
    uses_one = widths == (512, 64) and dtype is torch.bfloat16
    assert bench.calls["npu_kv_rmsnorm_rope_cache"] == uses_one
    assert bench.calls["npu_scatter_nd_update_"] == (0 if uses_one else 2)
    truth = LatentCache.joint(128, 16, widths, torch.float32, CPU)
    reference.write_latents(truth, kv.float(), weight.float(), 1e-6, rotation, slots)
    others = torch.tensor([slot for slot in range(128) if slot not in slots.tolist()])
    for part, old, expected in zip(cache.tensors, before, (truth.latent_SC, truth.rope_SD), strict=True):
        _close(part[slots], expected[slots], dtype)
        assert torch.equal(part[others], old[others])


@pytest.mark.parametrize(
    ("dtype", "heads", "block_tokens", "widths", "runs"),
    [
        (torch.bfloat16, 4, 16, (512, 64), True),
        (torch.bfloat16, 128, 32, (512, 64), True),
        (torch.bfloat16, 6, 16, (512, 64), False),
        (torch.bfloat16, 4, 8, (512, 64), False),
        (torch.bfloat16, 4, 16, (96, 32), False),
        (torch.float32, 4, 16, (512, 64), False),
    ],
)
@pytest.mark.parametrize("has_v2", [True, False], ids=["newer", "older"])
def test_decoding_on_the_paged_cache(
    dtype: torch.dtype, heads: int, block_tokens: int, widths: tuple[int, int], runs: bool, has_v2: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import torch_npu

    if not has_v2:
        monkeypatch.delattr(torch_npu, "npu_fused_infer_attention_score_v2")
    torch.manual_seed(8)
    cache = _cache(widths, block_tokens, dtype)
    table = torch.tensor([[3, 0, 5], [7, 0, 0], [1, 2, 4]], dtype=torch.int32)
    context = DecodeContext(table, [2 * block_tokens + 3, 1, 3 * block_tokens], block_tokens)
    query_C, query_D = (torch.randn(3, heads, width).to(dtype) for width in widths)
    with no_waiting():
        seen = OPS.mla_decode(query_C, query_D, cache, context, 0.1)
    name = "npu_fused_infer_attention_score" + ("_v2" if has_v2 else "")
    assert bench.calls[name] == runs
    floats = LatentCache(cache.latent_SC.float(), cache.rope_SD.float(), block_tokens)
    _close(seen, reference.mla_decode(query_C.float(), query_D.float(), floats, context, 0.1), dtype)


@pytest.mark.parametrize(
    ("dtype", "widths", "runs"),
    [
        (torch.bfloat16, (128, 64, 128), True),
        (torch.bfloat16, (24, 8, 16), False),
        (torch.float32, (128, 64, 128), False),
        (torch.float16, (128, 64, 128), False),
    ],
)
def test_blocks_of_a_prefill_merge_to_the_references(
    dtype: torch.dtype, widths: tuple[int, int, int], runs: bool
) -> None:
    torch.manual_seed(9)
    heads, queries, keys = 4, 9, 40
    shapes = ((queries, heads, widths[0]), (queries, heads, widths[1]), (keys, heads, widths[0]), (keys, widths[1]),
              (keys, heads, widths[2]))  # fmt: skip
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]

    def merged(attend: object, *tensors: Tensor) -> Tensor:
        q, q_rope, k, k_rope, v = tensors
        total: tuple[Tensor, Tensor] | None = None
        for block, causal in ((slice(31, 40), True), (slice(0, 16), False), (slice(16, 31), False)):
            part = attend(q, q_rope, k[block], k_rope[block], v[block], 0.07, causal=causal)  # type: ignore[operator]
            total = part if total is None else reference.merge_blocks(*total, *part)
        assert total is not None
        return total[0]

    seen = merged(OPS.attend_block, *inputs)
    assert bench.calls["npu_fused_infer_attention_score"] == (3 if runs else 0)
    tolerance = torch.bfloat16 if dtype is torch.float16 else dtype
    _close(seen, merged(reference.attend_block, *(each.float() for each in inputs)), tolerance)


@with_dtypes
@pytest.mark.parametrize("widths", [(192, 128), (12, 7), (6, 9)], ids=str)
def test_attention_of_training_and_its_gradients(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    torch.manual_seed(10)
    shapes = ((2, 3, 20, width) for width in (widths[0], widths[0], widths[1]))
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    seen, expected = OPS.attention(*leaves, 0.1), reference.attention(*exact, 0.1)
    assert bench.calls["npu_fusion_attention"] == 1
    _close(seen.detach(), expected.detach(), dtype)
    grad = torch.randn(expected.shape)
    for ours, truth in zip(
        torch.autograd.grad(seen, leaves, grad.to(dtype)), torch.autograd.grad(expected, exact, grad), strict=True
    ):
        _close(ours, truth, dtype)
