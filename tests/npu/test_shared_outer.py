"""Adapters with shared outer factors through Ascend's operators, on the bench, in batches with others and the base."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.engine.messages import CallId, LoadAdapter
from runtime.ops.base import Ops
from runtime.ops.cpu import CpuOps
from runtime.ops.npu import grouped
from runtime.ops.npu.ops import NpuOps
from tests.conftest import RecordNumber
from tests.npu import bench
from tests.npu.models import OPERATOR_SIZES, TinyBase, engine_with, feed, relative_errors, write_base
from tests.npu.no_waiting import no_waiting
from tests.oracle.adapters import AdapterRecipe, write_adapter
from tests.oracle.driver import Driver

HALF, FILE = torch.bfloat16, "adapter_model.safetensors"
RECIPE = AdapterRecipe(("routed_experts",), alpha=32.0, dtype=HALF)
SUM = "0.5*all+-0.7*some"
# The base, all and some, whose outer factors are shared, own, which has its own, and the sum of the first two.
SLOTS = [-1, 0, 1, 1, 2, 3]
NUM_STEPS = 20
LEAST_EFFECT = 0.05
_OUTER = re.compile(r"(.*\.mlp\.experts)\.\d+\.((?:gate|up)_proj\.lora_A|down_proj\.lora_B)\.weight")


@dataclass(frozen=True)
class Adapters:
    """The same adapters in two forms."""

    shared: list[Path]
    plain: list[Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return write_base(tmp_path_factory.mktemp("base") / "operator-sizes", OPERATOR_SIZES)


@pytest.fixture(scope="module")
def adapters(base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """In the order of their slots: as SGLang writes shared factors, and the same with all factors for each expert."""
    some = replace(RECIPE, lora_rank=32, seed=2, covers=lambda layer, expert: (layer + expert) % 4 > 0)
    recipes = {"all": replace(RECIPE, lora_rank=16, seed=1), "some": some}
    shared, plain = (tmp_path_factory.mktemp(kind) for kind in ("shared", "plain"))
    for name, recipe in recipes.items():
        _write_twins(base.path, shared / name, plain / name, recipe)
    own = write_adapter(base.path, shared / "own", replace(RECIPE, lora_rank=8, seed=3)).path
    return Adapters([shared / "all", shared / "some", own], [plain / "all", plain / "some", own])


def _write_twins(base: Path, shared: Path, plain: Path, recipe: AdapterRecipe) -> None:
    """The outer factors of one expert stand under the layer's name, [1, ...], for all of them; or under each one's."""
    names = load_file(write_adapter(base, plain, recipe).path / FILE)
    write_adapter(base, shared, recipe)
    once: dict[str, Tensor] = {}
    for name, tensor in names.items():
        if outer := _OUTER.fullmatch(name):
            names[name] = once.setdefault(f"{outer[1]}.{outer[2]}.weight", tensor[None])[0]
        else:
            once[name] = tensor
    save_file({name: tensor.clone() for name, tensor in once.items()}, shared / FILE)
    save_file({name: tensor.clone() for name, tensor in names.items()}, plain / FILE)


@contextmanager
def _serving(ops: Ops, base: TinyBase, adapters: list[Path], dtype: str) -> Iterator[Driver]:
    with engine_with(ops, base.path, adapters, dtype) as driver:
        call = CallId(10**6)
        driver.engine.submit(LoadAdapter(call, "sum", expression=SUM))
        while not driver.answered(call):
            driver.step()
        driver.run()
        assert [driver.show(name).slot for name in ("all", "some", "own", "sum")] == [0, 1, 2, 3]
        yield driver


def _fed(ops: Ops, base: TinyBase, adapters: list[Path], dtype: str, slots: list[int] = SLOTS) -> Tensor:
    with _serving(ops, base, adapters, dtype) as driver:
        return feed(driver.engine.runner, [7, 45, 30, 61, 20, 33], slots, NUM_STEPS)


def test_a_mixed_batch_gives_what_the_cpu_gives_with_all_factors_for_each_expert(
    base: TinyBase, adapters: Adapters, record_number: RecordNumber
) -> None:
    """What lies beyond a group list is NaN on the bench, so rows that a list forgets would show."""
    bench.calls.clear()
    seen = _fed(NpuOps(), base, adapters.shared, "float32")
    assert bench.calls["npu_grouped_matmul"] > 0 and bench.calls["npu_moe_finalize_routing"] > 0
    expected = _fed(CpuOps(), base, adapters.plain, "float32")
    largest = (seen - expected).abs().max().item()
    record_number("shared-outer beside LoRA and the base in float32, logits vs the CPU's", largest, at_most=1e-4)
    base_only = _fed(CpuOps(), base, adapters.plain, "float32", [-1] * len(SLOTS))
    for place, slot in enumerate(SLOTS):
        assert slot < 0 or (expected - base_only)[:, place].abs().max() > LEAST_EFFECT


def test_outer_factors_are_stored_once_on_the_device_in_a_sum_too(base: TinyBase, adapters: Adapters) -> None:
    file_bytes = [sum(tensor.nbytes for tensor in load_file(path / FILE).values()) for path in adapters.shared]
    with _serving(NpuOps(), base, adapters.shared, "bfloat16") as driver:
        assert [driver.show(path.name).device_bytes for path in adapters.shared[:2]] == file_bytes[:2]
        joined = driver.show("sum").device_bytes
    with _serving(NpuOps(), base, adapters.plain, "bfloat16") as driver:
        assert sum(file_bytes[:2]) < joined < driver.show("sum").device_bytes


def test_in_bfloat16_they_are_as_exact_as_all_factors_for_each_expert(
    base: TinyBase, adapters: Adapters, record_number: RecordNumber
) -> None:
    """Compared with the other form on the same operators: a near tie in the router makes single tokens jump in both."""
    exact = _fed(CpuOps(), base, adapters.plain, "float32")
    shared, plain = (
        relative_errors(_fed(NpuOps(), base, paths, "bfloat16"), exact) for paths in (adapters.shared, adapters.plain)
    )
    ratio = (shared.mean() / plain.mean()).item()
    record_number("shared-outer in bfloat16: mean error / that of all factors for each expert", ratio, at_most=1.1)
    record_number("shared-outer in bfloat16: median error of a token", shared.median().item(), at_most=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_step_waits_for_the_device(base: TinyBase, adapters: Adapters, dtype: str) -> None:
    with _serving(NpuOps(), base, adapters.shared, dtype) as driver:
        runner, seen = driver.engine.runner, []
        plain: Callable[..., object] = runner.model.forward

        def watched(*args: object) -> object:
            with no_waiting() as mode:
                result = plain(*args)
            seen.append(mode.num_seen)
            return result

        runner.model.forward = watched
        feed(runner, [25, 1, 19, 44, 1, 7], SLOTS, num_steps=4)
    assert len(seen) == 4 and min(seen) > 0


def test_more_pages_than_a_launch_takes_are_more_launches(
    base: TinyBase, adapters: Adapters, monkeypatch: pytest.MonkeyPatch, record_number: RecordNumber
) -> None:
    expected = _fed(CpuOps(), base, adapters.plain, "float32")
    monkeypatch.setattr(grouped, "MAX_GROUPS", 8)
    largest = (_fed(NpuOps(), base, adapters.shared, "float32") - expected).abs().max().item()
    record_number("shared-outer in launches of 8 groups, logits vs the CPU's", largest, at_most=1e-4)
