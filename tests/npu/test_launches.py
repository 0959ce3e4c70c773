"""What a step launches on Ascend: counted at small size, and the counts that stand in docs/ascend.md."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.npu_launches import RESULTS, _counts, by_kind, cases_of, predict
from benchmarks.npu_steps import MODELS, UPLOAD, Case, Model, Part, is_lora, kind_of, record_step
from runtime.ops.npu.ops import NpuOps
from tests.npu import bench
from tests.npu.models import OPERATOR_SIZES, TinyBase, engine_with, feed, write_base
from tests.npu.no_waiting import no_waiting
from tests.oracle.adapters import AdapterRecipe, write_adapter

# 16 experts, so that 64 adapters have 1,024 pages in a layer.
SMALL = Model("small", OPERATOR_SIZES | {"num_hidden_layers": 4, "moe_intermediate_size": 64}, 1, 3)
V3, DENSE = MODELS["V3 EP16"], "dense layer"
LORA_PRODUCTS = 5  # A of gate and up, B of gate, B of up; A and B of down


def _routed(parts: list[Part]) -> Counter[str]:
    (part,) = (part for part in parts if part.name == "routed layer")
    return Counter(kind_of(launch) for launch in part.launches)


@pytest.mark.parametrize("case", [Case(8, 0), Case(64, 0, prefill=True)], ids=lambda case: case.label)
def test_a_routed_layer_without_adapters_launches_two_grouped_products(case: Case) -> None:
    kinds = _routed(record_step(SMALL, case))
    assert kinds["npu_grouped_matmul"] == 2 and kinds["npu_grouped_matmul (LoRA)"] == 0


@pytest.mark.parametrize("num_rows", [1, 8, 80])
def test_launches_do_not_depend_on_the_number_of_adapters_up_to_1024_pages(num_rows: int) -> None:
    one, few, most = (record_step(SMALL, Case(num_rows, num)) for num in (1, 3, 64))
    names = [[launch.operator for part in parts for launch in part.launches] for parts in (one, few, most)]
    assert names[0] == names[1] == names[2]
    assert _routed(most)["npu_grouped_matmul"] == 2
    assert _routed(most)["npu_grouped_matmul (LoRA)"] == LORA_PRODUCTS


def test_each_1024_pages_more_are_one_launch_more_of_each_product() -> None:
    for num_adapters, num_launches in ((64, 1), (65, 2), (128, 2), (129, 3)):
        kinds = _routed(record_step(SMALL, Case(8, num_adapters)))
        assert kinds["npu_grouped_matmul (LoRA)"] == LORA_PRODUCTS * num_launches


def test_what_stands_for_all_layers_is_uploaded_and_computed_once() -> None:
    for case in (Case(8, 3), Case(8, 3, coverage=0.5)):
        parts = {part.name: Counter(kind_of(launch) for launch in part.launches) for part in record_step(SMALL, case)}
        assert parts["first routed layer"][UPLOAD] > 0
        assert parts["routed layer"][UPLOAD] == parts["first dense layer"][UPLOAD] == 0
        assert parts["routed layer"].total() < parts["first routed layer"].total()


def test_mlas_projections_are_one_launch_in_place_of_nine() -> None:
    """Adapters on the experts leave it so, and what it moves is the same."""
    for num_adapters in (0, 3):
        one, separate = (
            next(part for part in record_step(V3, Case(8, num_adapters, mla_prolog=allowed)) if part.name == DENSE)
            for allowed in (True, False)
        )
        kinds, before = (Counter(kind_of(launch) for launch in part.launches) for part in (one, separate))
        assert kinds - before == {"npu_mla_prolog_v3": 1}
        assert before - kinds == {
            "aten.mm": 3, "npu_rms_norm": 1, "aten.clone": 2, "npu_interleave_rope": 1, "npu_kv_rmsnorm_rope_cache": 1,
            "aten.bmm": 1,
        }  # fmt: skip
        flops = [sum(launch.flops for launch in part.launches) for part in (one, separate)]
        read = [sum(launch.bytes_read for launch in part.launches) for part in (one, separate)]
        assert flops[0] == flops[1] and 0.9 * read[1] < read[0] < read[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return write_base(tmp_path_factory.mktemp("base") / "operator-sizes", OPERATOR_SIZES)


def test_a_step_reads_the_pages_of_its_own_adapters_once_and_does_not_wait(base: TinyBase, tmp_path: Path) -> None:
    """Three adapters are resident and two run; the group lists cover the pages of all three."""
    recipes = [AdapterRecipe(("routed_experts",), lora_rank=16, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    adapters = [write_adapter(base.path, tmp_path / f"adapter-{index}", recipe).path
                for index, recipe in enumerate(recipes)]
    with engine_with(NpuOps(), base.path, adapters, "bfloat16") as driver:
        runner = driver.engine.runner
        plain = runner.model.forward

        def watched(*args: object) -> object:
            with no_waiting():
                return plain(*args)

        runner.model.forward = watched
        with bench.record() as launches:
            feed(runner, [60, 60], [0, 2], num_steps=1, chunk_tokens=60)
        resident_bytes = runner._pages.num_bytes
    products = [launch for launch in launches if is_lora(launch)]
    assert len(products) == LORA_PRODUCTS * 2  # of the base's three layers two are routed
    assert all(launch.inputs[2] == ((3 * 16,), torch.int64) for launch in products)
    read = sum(launch.bytes_read - _bytes(launch, 0) - _bytes(launch, 2) for launch in products)
    assert read == resident_bytes * 2 // 3


def _bytes(launch: bench.Launch, index: int) -> int:
    shape, dtype = launch.inputs[index]
    return torch.Size(shape).numel() * dtype.itemsize


def test_a_prediction_is_the_longer_of_computing_and_moving_after_the_start() -> None:
    moves = predict(bench.Launch("aten.add", (), 10**9, 10**9, 0))
    assert moves.seconds == pytest.approx([2e-6 + 2e9 / (1.6 * 2**40 * 0.6)] * 3)
    multiplies = predict(bench.Launch("npu_grouped_matmul", (), 10, 10, 10**12))
    assert multiplies.seconds == pytest.approx([5e-6 + 1 / (peak * 0.7) for peak in (245.8, 294.9, 353.9)])
    assert (multiplies.operators, multiplies.others, moves.operators, moves.others) == (1, 0, 0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_committed_counts_are_those_of_the_code(name: str) -> None:
    """After a change that moves them: `make npu-launches`, and the tables of docs/ascend.md."""
    committed = json.loads((RESULTS / "npu_launches.json").read_text(encoding="utf-8"))["models"][name]
    cases = cases_of(name)
    assert list(committed) == [case.label for case in cases]
    checked = (Case(32, 0), Case(32, 8), Case(32, 8, coverage=0.1), Case(2048, 1, prefill=True))
    for case in (*checked, *(case for case in cases if not case.mla_prolog)):
        for part, stored in zip(record_step(MODELS[name], case), committed[case.label]["parts"], strict=True):
            seen = {kind: _counts(launches) for kind, launches in by_kind(part.launches).items()}
            assert (part.name, part.times, seen) == (stored["name"], stored["times"], stored["operators"]), case.label
