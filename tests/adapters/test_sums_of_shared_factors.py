"""Sums of adapters whose outer factors are one for all experts: they stay so, and mean the sum of the merged deltas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loaders.adapter import AdapterWeights, LoraPair
from loaders.errors import AdapterError
from runtime.adapters.compose import compose, joined_bytes
from runtime.adapters.host_adapter import FactorLayout, HostAdapter, to_host_adapter
from runtime.config import EngineConfig
from runtime.errors import Exhausted
from tests.adapters.conftest import MakeStore
from tests.adapters.test_other_layouts import draw_for_v3
from tests.adapters.test_shared_outer import HIDDEN, shared_weights, unmarked
from tests.conftest import RecordNumber
from tests.loaders.formats import layouts
from tests.oracle.adapters import AdapterRecipe, merge_by_hand, write_adapter
from tests.oracle.base_models import Oracle, logits
from tests.oracle.driver import Driver, driven_engine
from tests.oracle.shapes import V3, Shape

LOGITS_TOLERANCE = 1e-4
LEAST_EFFECT = 0.05
STORED_LAYOUTS = [FactorLayout(), FactorLayout(16, a_rows_first=True)]
SGLANG, TINKER = "SGLang shared-outer factors", "Tinker stacks (w1, w2, w3)"
Deltas = dict[str, Tensor]
MIX: dict[str, dict[str, float]] = {
    "0.5*wide+-2*tinker": {"wide": 0.5, "tinker": -2.0},
    "wide+0.7*tinker+1.5*few": {"wide": 1.0, "tinker": 0.7, "few": 1.5},
    "1.3*few": {"few": 1.3},
    "0.4*few+0.6*own": {"few": 0.4, "own": 0.6},
    "tinker": {"tinker": 1.0},
    "few": {"few": 1.0},
    "": {},
}


def _write(folder: Path, monkeypatch: pytest.MonkeyPatch, layout: str, rank: int, lacking: set[int]) -> Deltas:
    """An adapter in one of the layouts, without some experts."""
    monkeypatch.setattr(layouts, "RANK", rank)
    written = draw_for_v3(monkeypatch, layout)
    folder.mkdir()
    own = {f"{layouts.MOE}.{expert}." for expert in lacking}
    tensors = {key: value for key, value in written.tensors.items() if not any(name in key for name in own)}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"r": rank, "lora_alpha": 0.1 * rank} | written.config
    (folder / "adapter_config.json").write_text(layouts.as_json(settings))
    deltas = {key.removesuffix(".weight"): delta for key, delta in written.deltas.items()}
    return {key: delta for key, delta in deltas.items() if not any(name in key for name in own)}


@contextmanager
def _served(base: Oracle, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Driver, dict[str, Deltas]]]:
    """Three with shared outer factors, of different ranks, one of them without a third of the experts; one without."""
    own = write_adapter(base.path, folder / "own", AdapterRecipe(("routed_experts", "o_proj"), lora_rank=4, seed=5))
    num_experts = V3.config["n_routed_experts"]
    deltas = {
        "wide": _write(folder / "wide", monkeypatch, SGLANG, 8, set()),
        "tinker": _write(folder / "tinker", monkeypatch, TINKER, 16, set()),
        "few": _write(folder / "few", monkeypatch, SGLANG, 3, set(range(0, num_experts, 3))),
        "own": own.deltas,
    }
    config = EngineConfig(base.path, dtype="float32", max_model_len=256, kv_cache_tokens=1024, adapter_memory_gib=0.1)
    with driven_engine(config) as driver:
        for name in deltas:
            driver.load(name, folder / name)
        yield driver, deltas


def _merged(base: Oracle, deltas: dict[str, Deltas], weights: dict[str, float]) -> torch.nn.Module:
    total: Deltas = {}
    for name, weight in weights.items():
        for module, delta in deltas[name].items():
            total[module] = total.get(module, torch.zeros_like(delta)) + weight * delta
    return merge_by_hand(base.model, total)


def test_sums_of_shared_factors_in_a_mixed_batch_equal_merged_weights(
    oracle: Callable[[Shape], Oracle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_number: RecordNumber
) -> None:
    base = oracle(V3)
    with _served(base, tmp_path, monkeypatch) as (driver, deltas):
        asked = {}
        for place, name in enumerate(MIX):
            prompt = base.prompt(20 + 7 * place, seed=place)
            asked[driver.add(prompt, adapter=name or None, max_new_tokens=3)] = (name, prompt)
        driver.run()
    worst = 0.0
    for request, (name, prompt) in asked.items():
        outcome = driver.outcomes[request]
        assert outcome.failure is None, outcome.failure
        ids = prompt + outcome.tokens[:-1]
        expected = logits(_merged(base, deltas, MIX[name]), ids)[len(prompt) - 1 :]
        for part in MIX[name]:
            rest = {other: weight for other, weight in MIX[name].items() if other != part}
            without = logits(_merged(base, deltas, rest), ids)[len(prompt) - 1 :]
            assert (expected - without).abs().max() > LEAST_EFFECT
        worst = max(worst, (torch.stack(outcome.logits) - expected).abs().max().item())
    record_number("V3: sums of shared-outer in a mixed batch, vs merged by hand", worst, at_most=LOGITS_TOLERANCE)


def test_a_sum_of_shared_factors_takes_the_bytes_of_its_parts_on_the_device(
    oracle: Callable[[Shape], Oracle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_number: RecordNumber
) -> None:
    with _served(oracle(V3), tmp_path, monkeypatch) as (driver, _):
        driver.generate([5, 6, 7], adapter="0.5*wide+-2*tinker", max_new_tokens=2)
        joined = driver.show("0.5*wide+-2*tinker").device_bytes
        parts = sum(driver.show(name).device_bytes for name in ("wide", "tinker"))
    record_number("device bytes of a sum of shared-outer / those of its parts", joined / parts, at_most=1.0)


def _hosts(files: list[AdapterWeights], layout: FactorLayout = STORED_LAYOUTS[0]) -> list[HostAdapter]:
    return [to_host_adapter(file, torch.float32, layout) for file in files]


def _weighted(hosts: list[HostAdapter]) -> list[tuple[float, HostAdapter]]:
    return list(zip((0.5, -2.0, 1.0), hosts, strict=False))


def _deltas(adapter: HostAdapter, layout: FactorLayout) -> dict[tuple[int, str], Tensor]:
    """What each expert's factors of layer 3 multiply to; what is zero is left out."""
    found = {}
    for pages in adapter.expanded().experts[3]:
        factors = {
            name: factor.transpose(1, 2) if layout.a_rows_first and name.startswith("a") else factor
            for name, factor in pages.factors.items()
        }
        a_gate, a_up = factors["a13"].chunk(2, dim=2)
        for side, a, b in (("gate", a_gate, "b_gate"), ("up", a_up, "b_up"), ("down", factors["a2"], "b2")):
            for expert, delta in zip(pages.regions, a @ factors[b], strict=True):
                found[expert, side] = delta
    return {key: delta for key, delta in found.items() if delta.any()}


# Nearly all experts: zeros for what one lacks take less than outer factors for each expert.
ALIKE = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5, 6]]


@pytest.mark.parametrize("layout", STORED_LAYOUTS, ids=["plain", "rows first"])
def test_a_sum_stores_outer_factors_once_and_multiplies_to_what_expanded_parts_do(layout: FactorLayout) -> None:
    files = [shared_weights(seed, ALIKE[seed], rank=rank) for seed, rank in enumerate((8, 16, 3))]
    joined = compose(_weighted(_hosts(files, layout)), 512)
    expected = _deltas(compose(_weighted(_hosts([unmarked(file) for file in files], layout)), 512), layout)
    assert list(joined.shared_outer) == [3] and not joined.experts
    own = joined.shared_outer[3]
    rank = sum(layout.padded_rank(rank) for rank in (8, 16, 3))
    assert (own.outer.lora_rank, own.inner.lora_rank, own.inner.regions) == (rank, rank, list(range(7)))
    assert own.inner.a_rows_first is own.outer.a_rows_first is layout.a_rows_first
    got = _deltas(joined, layout)
    assert got.keys() == expected.keys()
    for key, delta in got.items():
        torch.testing.assert_close(delta, expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", STORED_LAYOUTS, ids=["plain", "rows first"])
def test_with_equal_coverage_a_sum_takes_the_bytes_of_its_parts(layout: FactorLayout) -> None:
    parts = _hosts([shared_weights(seed, [0, 2, 5], rank=rank) for seed, rank in enumerate((8, 16, 3))], layout)
    joined = compose(_weighted(parts), 512)
    assert joined.num_bytes == joined_bytes(parts, 512) == sum(part.num_bytes for part in parts)


@pytest.mark.parametrize(
    ("coverage", "is_shared"),
    [
        ([[0, 1], [2, 3]], False),
        ([[0, 2, 5], [2, 4]], False),
        ([[0, 1, 2], [0, 1, 3]], True),
        ([[0, 1, 2], [0, 1]], True),
    ],
)
def test_where_zeros_would_take_more_than_outer_factors_for_each_expert_these_are_stored(
    coverage: list[list[int]], is_shared: bool
) -> None:
    parts = _hosts([shared_weights(seed, experts) for seed, experts in enumerate(coverage)])
    joined = compose(_weighted(parts), 512)
    assert (bool(joined.shared_outer), bool(joined.experts)) == (is_shared, not is_shared)
    expanded = sum(part.expanded().num_bytes for part in parts)
    assert joined.num_bytes == joined_bytes(parts, 512)
    assert joined.num_bytes < expanded if is_shared else joined.num_bytes == expanded


def test_a_layer_in_which_one_part_has_own_factors_has_them_for_each_expert() -> None:
    parts = _hosts([shared_weights(1, [0, 1]), unmarked(shared_weights(2, [0, 1]))])
    joined = compose(_weighted(parts), 512)
    assert not joined.shared_outer and joined.num_bytes == joined_bytes(parts, 512)


def test_a_joined_rank_over_the_limit_is_refused_and_named() -> None:
    parts = _hosts([shared_weights(seed, [0, 1]) for seed in (1, 2)])
    assert compose(_weighted(parts), 16).shared_outer
    with pytest.raises(AdapterError, match=r"joined rank is 16 \(expert 0 of layer 3\).*15 at most"):
        compose(_weighted(parts), 15)


def test_a_sum_whose_experts_are_within_the_limit_of_rank_is_not_refused_for_its_outer_factors() -> None:
    """No expert has all three parts, and so none has more than 24; outer factors for all would have 32."""
    coverage = ([0, 1, 2, 3, 4, 5], 8), ([1, 2, 3, 4, 5], 16), ([0], 8)
    parts = _hosts([shared_weights(seed, experts, rank) for seed, (experts, rank) in enumerate(coverage)])
    assert compose(_weighted(parts), 32).shared_outer
    tight = compose(_weighted(parts), 24)
    assert not tight.shared_outer and tight.num_bytes == joined_bytes(parts, 24)


def test_a_weighted_outer_factor_that_overflows_the_type_is_refused() -> None:
    file = shared_weights(1, [0, 1])
    large = torch.full((HIDDEN, 8), 100.0)
    experts = {
        index: replace(own, down=LoraPair(own.down.a, large, 0.5, b_is_shared=True))
        for index, own in file.experts[3].items()
        if own.down is not None
    }
    part = to_host_adapter(replace(file, experts={3: experts}), torch.float16)
    assert part.shared_outer and compose([(1200.0, part)], 512).shared_outer
    with pytest.raises(AdapterError) as caught:
        compose([(1400.0, part)], 512)
    assert caught.value.problems[0].startswith("routed experts of layer 3: factors overflow float16")


def test_a_sum_that_fits_into_the_memory_as_it_is_stored_is_served(
    make: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of its parts count, not those of outer factors for each expert."""
    for name, layout in (("wide", SGLANG), ("tinker", TINKER)):
        _write(tmp_path / name, monkeypatch, layout, 8, set())
    roomy = make()
    bytes_of_parts = sum(roomy.load(name, tmp_path / name).device_bytes for name in ("wide", "tinker"))
    for max_bytes, fits in ((bytes_of_parts, True), (bytes_of_parts - 1, False)):
        store = make(max_bytes=max_bytes)
        for name in ("wide", "tinker"):
            store.load(name, tmp_path / name)
        store.compose("mix", "wide+0.5*tinker")
        (answer,) = store.wait()
        assert isinstance(answer, Exhausted) is not fits
        if isinstance(answer, Exhausted):
            assert f"takes {bytes_of_parts} bytes on the device or more" in str(answer)
