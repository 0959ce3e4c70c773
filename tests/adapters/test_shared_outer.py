"""Adapters whose outer factors are one for all experts: stored once, and what they mean in mixed batches and sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loaders.adapter import AdapterWeights, ExpertLora, LoraPair
from runtime.adapters.compose import compose
from runtime.adapters.host_adapter import FactorLayout, HostAdapter, to_host_adapter
from runtime.config import EngineConfig
from tests.adapters.test_other_layouts import draw_for_v3
from tests.conftest import RecordNumber
from tests.loaders.formats import layouts
from tests.oracle.adapters import AdapterRecipe, merge_by_hand, write_adapter
from tests.oracle.base_models import Oracle, logits
from tests.oracle.driver import Driver, driven_engine
from tests.oracle.shapes import V3, Shape

LOGITS_TOLERANCE = 1e-4
LEAST_EFFECT = 0.05
LAYER_LAYOUTS = [FactorLayout(), FactorLayout(16, a_rows_first=True)]
HIDDEN, WIDTH = 12, 20


@dataclass
class Case:
    base: Oracle
    driver: Driver
    deltas: dict[str, dict[str, Tensor]]
    tensor_bytes: dict[str, int]


@contextmanager
def _served(base: Oracle, folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int = layouts.RANK) -> Iterator[Case]:
    """`sglang` and `tinker` share outer factors, `own` does not."""
    monkeypatch.setattr(layouts, "RANK", rank)
    own = write_adapter(base.path, folder / "own", AdapterRecipe(("routed_experts", "o_proj"), lora_rank=4, seed=5))
    deltas, paths, num_bytes = {"": {}, "own": own.deltas}, {"own": own.path}, {}
    for name, layout in (("sglang", "SGLang shared-outer factors"), ("tinker", "Tinker stacks (w1, w2, w3)")):
        written = draw_for_v3(monkeypatch, layout)
        paths[name] = folder / name
        paths[name].mkdir()
        save_file(written.tensors, paths[name] / "adapter_model.safetensors")
        settings = {"r": rank, "lora_alpha": 0.1 * rank} | written.config
        (paths[name] / "adapter_config.json").write_text(layouts.as_json(settings))
        deltas[name] = {key.removesuffix(".weight"): delta for key, delta in written.deltas.items()}
        num_bytes[name] = sum(tensor.nbytes for tensor in written.tensors.values())
    config = EngineConfig(base.path, dtype="float32", max_model_len=256, kv_cache_tokens=1024, adapter_memory_gib=0.1)
    with driven_engine(config) as driver:
        for name, path in paths.items():
            driver.load(name, path)
        yield Case(base, driver, deltas, num_bytes)


def test_mixed_batches_of_shared_and_own_factors_and_the_base_equal_merged_weights(
    oracle: Callable[[Shape], Oracle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_number: RecordNumber
) -> None:
    base = oracle(V3)
    with _served(base, tmp_path, monkeypatch) as case:
        asked = {}
        for place, name in enumerate(("sglang", "", "own", "tinker", "0.5*sglang+own")):
            prompt = base.prompt(20 + 7 * place, seed=place)
            asked[case.driver.add(prompt, adapter=name or None, max_new_tokens=3)] = (name, prompt)
        case.driver.run()
        worst = 0.0
        for request, (name, prompt) in asked.items():
            outcome = case.driver.outcomes[request]
            deltas = case.deltas.get(name) if name in case.deltas else _sum(case.deltas["sglang"], case.deltas["own"])
            ids = prompt + outcome.tokens[:-1]
            expected = logits(merge_by_hand(base.model, deltas or {}), ids)[len(prompt) - 1 :]
            if name:
                assert (expected - logits(base.model, ids)[len(prompt) - 1 :]).abs().max() > LEAST_EFFECT
            worst = max(worst, (torch.stack(outcome.logits) - expected).abs().max().item())
    record_number("V3: shared-outer in a mixed batch, vs merged by hand", worst, at_most=LOGITS_TOLERANCE)


def _sum(half: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {module: 0.5 * delta for module, delta in half.items()}
    return found | {module: found.get(module, 0) + delta for module, delta in whole.items()}


@pytest.mark.parametrize("name", ["sglang", "tinker"])
def test_shared_factors_take_the_bytes_that_they_have_in_the_file(
    name: str, oracle: Callable[[Shape], Oracle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    record_number: RecordNumber,
) -> None:  # fmt: skip
    with _served(oracle(V3), tmp_path, monkeypatch, rank=8) as case:
        info = case.driver.show(name)
        pages = case.driver.engine.adapters.pages
        num_bytes = sum(other.device_bytes for other in map(case.driver.show, ("own", "sglang", "tinker")))
        assert pages.num_bytes == num_bytes and info.host_bytes == info.device_bytes
        assert [(layer.layer, layer.num_experts) for layer in info.layers] == [(1, V3.config["n_routed_experts"])]
        case.driver.unload(name)
        assert pages.num_bytes == num_bytes - info.device_bytes
    ratio = info.device_bytes / case.tensor_bytes[name]
    record_number(f"{name}, rank 8: device bytes / own tensors' bytes", ratio, at_least=1.0, at_most=1.05)


def shared_weights(seed: int, experts: list[int], rank: int = 8, *, scale: float = 0.5) -> AdapterWeights:
    torch.manual_seed(seed)
    a_gate, a_up, b_down = torch.randn(rank, HIDDEN), torch.randn(rank, HIDDEN), torch.randn(HIDDEN, rank)

    def expert() -> ExpertLora:
        gate, up = (LoraPair(a, torch.randn(WIDTH, rank), scale, a_is_shared=True) for a in (a_gate, a_up))
        return ExpertLora(gate, up, LoraPair(torch.randn(rank, WIDTH), b_down, scale, b_is_shared=True))

    own = {3: {index: expert() for index in experts}}
    return AdapterWeights({}, own, str, {}, "", (), 0, ())


def unmarked(weights: AdapterWeights) -> AdapterWeights:
    """The same without the marks, so that every expert gets all factors."""

    def plain(pair: LoraPair | None) -> LoraPair | None:
        return None if pair is None else LoraPair(pair.a, pair.b, pair.scale)

    experts = {
        layer: {
            index: ExpertLora(plain(expert.gate), plain(expert.up), plain(expert.down)) for index, expert in own.items()
        }
        for layer, own in weights.experts.items()
    }
    return replace(weights, experts=experts)


def _assert_equal(one: HostAdapter, other: HostAdapter) -> None:
    assert list(one.experts) == list(other.experts) and not one.shared_outer and not other.shared_outer
    for layer in one.experts:
        for pages, expected in zip(one.experts[layer], other.experts[layer], strict=True):
            assert (pages.regions, pages.lora_rank) == (expected.regions, expected.lora_rank)
            for name, factor in expected.factors.items():
                assert torch.equal(pages.factors[name], factor)


@pytest.mark.parametrize("layout", LAYER_LAYOUTS, ids=["plain", "rows first"])
def test_shared_factors_expand_to_what_each_expert_would_have(layout: FactorLayout) -> None:
    weights = shared_weights(1, [0, 2, 5], rank=3)
    shared = to_host_adapter(weights, torch.float32, layout)
    plain = to_host_adapter(unmarked(weights), torch.float32, layout)
    _assert_equal(shared.expanded(), plain)
    assert list(shared.shared_outer) == [3] and shared.num_bytes < plain.num_bytes
    assert (shared.num_expert_pages, shared.experts_of_layers) == (plain.num_expert_pages, plain.experts_of_layers)


@pytest.mark.parametrize("layout", LAYER_LAYOUTS, ids=["plain", "rows first"])
def test_a_sum_with_shared_factors_is_the_sum_of_what_they_expand_to(layout: FactorLayout) -> None:
    parts = [shared_weights(1, [0, 2, 5]), shared_weights(2, [2, 4], rank=16)]
    shared = [to_host_adapter(part, torch.float32, layout) for part in parts]
    plain = [to_host_adapter(unmarked(part), torch.float32, layout) for part in parts]
    weights = (0.5, -2.0)
    _assert_equal(
        compose(list(zip(weights, shared, strict=True)), 512), compose(list(zip(weights, plain, strict=True)), 512)
    )


def test_factors_are_shared_only_if_the_same_one_with_one_scale_serves_all_experts() -> None:
    weights = shared_weights(1, [0, 1])
    first, second = weights.experts[3].values()
    assert first.down is not None and second.down is not None
    for other in (
        replace(second, down=replace(second.down, scale=0.25)),
        replace(second, down=replace(second.down, b=second.down.b.clone())),
        replace(second, down=replace(second.down, b_is_shared=False)),
    ):
        mixed = replace(weights, experts={3: {0: first, 1: other}})
        _assert_equal(to_host_adapter(mixed, torch.float32), to_host_adapter(unmarked(mixed), torch.float32))
    lacking = replace(weights, experts={3: {0: replace(first, down=None), 1: replace(second, gate=None)}})
    shared = to_host_adapter(lacking, torch.float32)
    assert list(shared.shared_outer) == [3]
    plain = to_host_adapter(unmarked(lacking), torch.float32)
    for got, expected in zip(_products(shared.expanded()), _products(plain), strict=True):
        assert torch.equal(got, expected)


def _products(adapter: HostAdapter) -> list[Tensor]:
    """What each expert's factors multiply to: gate, up, down."""
    (pages,) = adapter.experts[3]
    a_gate, a_up = pages.factors["a13"].chunk(2, dim=2)
    pairs = ((a_gate, "b_gate"), (a_up, "b_up"), (pages.factors["a2"], "b2"))
    return [a @ pages.factors[b] for a, b in pairs]
