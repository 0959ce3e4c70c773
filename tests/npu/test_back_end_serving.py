"""Serving through Ascend's operators, on the bench: the reference's tokens and logits, and what ran for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.demo import ADAPTERS_DIR, MODEL_DIR
from runtime.ops.base import Ops
from runtime.ops.cpu import CpuOps
from runtime.ops.npu.ops import NpuOps
from tests.conftest import RecordNumber
from tests.npu import bench
from tests.npu.models import (
    OPERATOR_SIZES,
    RECIPES,
    V2_LITE_CHOICE,
    TinyBase,
    engine_with,
    fed,
    feed,
    random_tokens,
    relative_errors,
    write_base,
)
from tests.npu.no_waiting import WaitsForDevice, no_waiting
from tests.oracle.adapters import write_adapter

NUM_DECODED = 64


@pytest.fixture(scope="module")
def demo_adapters() -> list[Path]:
    return sorted(path for path in ADAPTERS_DIR.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return write_base(tmp_path_factory.mktemp("base") / "operator-sizes", OPERATOR_SIZES)


@pytest.fixture(scope="module")
def adapters(base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(base.path, folder / name, recipe).path for name, recipe in RECIPES.items()]


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    bench.calls.clear()
    yield
    print("\n" + "\n".join(f"  {name:40} {count:>6} runs" for name, count in bench.calls.most_common()))


def _generated(ops: Ops, adapters: list[Path]) -> tuple[list[list[int]], list[Tensor]]:
    """Two requests for each adapter and the base, all at once: long prompts go in chunks, beside decodes."""
    names = [None, *(adapter.name for adapter in adapters)] * 2
    with engine_with(ops, MODEL_DIR, adapters, "float32") as driver:
        ids = [
            driver.add(random_tokens(4 + 23 * index, index), adapter=name, max_new_tokens=NUM_DECODED + 1)
            for index, name in enumerate(names)
        ]
        driver.run()
        outcomes = [driver.outcomes[request_id] for request_id in ids]
        return [outcome.tokens for outcome in outcomes], [torch.stack(outcome.logits) for outcome in outcomes]


def test_the_demo_with_its_adapters_gives_the_references_tokens(
    demo_adapters: list[Path], record_number: RecordNumber
) -> None:
    tokens, logits = _generated(NpuOps(), demo_adapters)
    assert bench.calls["npu_grouped_matmul"] > 0
    for name in ("npu_moe_gating_top_k", "npu_moe_init_routing_v2", "npu_moe_finalize_routing", "npu_swiglu"):
        # Two base products a routed layer and step; all other grouped products are LoRA's.
        assert bench.calls[name] > 0
        assert bench.calls["npu_grouped_matmul"] > 4 * bench.calls[name]
    expected_tokens, expected_logits = _generated(CpuOps(), demo_adapters)
    assert [len(each) for each in tokens] == [NUM_DECODED + 1] * len(tokens)
    assert tokens == expected_tokens
    largest = max((seen - truth).abs().max().item() for seen, truth in zip(logits, expected_logits, strict=True))
    record_number("demo in float32, logits vs the CPU's", largest, at_most=1e-4)


@pytest.mark.parametrize("choice", [{}, V2_LITE_CHOICE], ids=["V3", "V2-Lite"])
def test_operators_of_deepseeks_own_sizes_give_the_references_logits_in_bfloat16(
    choice: dict[str, object], tmp_path: Path, record_number: RecordNumber
) -> None:
    """Both back-ends against the CPU in float32 with the same weights.

    A near tie in the router makes single tokens jump in either, so the bound of 2e-2 is on the median token, and the
    mean is compared with the CPU's own in 16 bits.
    """
    two_routed_layers = {"num_hidden_layers": 2, "first_k_dense_replace": 0}
    base = write_base(tmp_path / "base", OPERATOR_SIZES | two_routed_layers | choice, seed=5)
    recipes = {name: recipe for name, recipe in RECIPES.items() if name != "attention-4"}
    adapters = [write_adapter(base.path, tmp_path / name, recipe).path for name, recipe in recipes.items()]
    exact = fed(CpuOps(), base.path, adapters, "float32", 4 + NUM_DECODED)
    plain = fed(CpuOps(), base.path, adapters, "bfloat16", 4 + NUM_DECODED)
    bench.calls.clear()
    seen = fed(NpuOps(), base.path, adapters, "bfloat16", 4 + NUM_DECODED)
    for name in (
        "npu_grouped_matmul", "npu_kv_rmsnorm_rope_cache", "npu_interleave_rope", "npu_fused_infer_attention_score",
        "npu_fused_infer_attention_score_v2", "npu_moe_gating_top_k", "npu_add_rms_norm",
    ):  # fmt: skip
        assert bench.calls[name] > 0, name
    kind = "V2-Lite" if choice else "V3"
    errors, plain_errors = (relative_errors(each, exact) for each in (seen, plain))
    ratio = (errors.mean() / plain_errors.mean()).item()
    record_number(f"{kind} sizes in bfloat16: mean error / the CPU's bfloat16 mean error", ratio, at_most=1.25)
    record_number(f"{kind} sizes in bfloat16: median error of a token", errors.median().item(), at_most=2e-2)


def test_the_same_in_float32_where_operators_allow_it(
    base: TinyBase, adapters: list[Path], record_number: RecordNumber
) -> None:
    seen = fed(NpuOps(), base.path, adapters, "float32", 24)
    assert bench.calls["npu_rotary_mul"] > 0 and bench.calls["npu_scatter_nd_update_"] > 0
    largest = (seen - fed(CpuOps(), base.path, adapters, "float32", 24)).abs().max().item()
    record_number("operator sizes in float32, logits vs the CPU's", largest, at_most=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_step_waits_for_the_device(base: TinyBase, adapters: list[Path], dtype: str) -> None:
    with engine_with(NpuOps(), base.path, adapters, dtype) as driver:
        runner, seen = driver.engine.runner, []
        for name in ("forward", "logits"):
            plain = getattr(runner.model, name)

            def watched(*args: object, plain: object = plain) -> object:
                with no_waiting() as mode:
                    result = plain(*args)  # type: ignore[operator]
                seen.append(mode.num_seen)
                return result

            setattr(runner.model, name, watched)
        feed(runner, [25, 1, 19, 44, 1, 5], [-1, -1, 0, 1, 2, 3], num_steps=4)
    assert len(seen) == 8 and min(seen) > 0


@pytest.mark.parametrize("wait", ["item", "tolist", "cpu", "bool index", "nonzero", "bincount", "unique"])
def test_what_waits_is_found(wait: str) -> None:
    """Guards the test above."""
    x = torch.arange(4)
    waits = {
        "item": lambda: x[1].item(), "tolist": lambda: x.tolist(), "bool index": lambda: x[x > 1],
        "nonzero": lambda: x.nonzero(), "bincount": lambda: torch.bincount(x), "unique": lambda: x.unique(),
        "cpu": lambda: x.cpu(),
    }  # fmt: skip
    with pytest.raises(WaitsForDevice), no_waiting():
        waits[wait]()
