"""The joined factors of a sum: what they multiply to, what they weigh, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loaders.adapter import AdapterWeights, ExpertLora, LoraPair
from loaders.errors import AdapterError
from runtime.adapters.compose import compose
from runtime.adapters.host_adapter import FactorLayout, HostAdapter, to_host_adapter
from runtime.adapters.page_pool import HostPages

HIDDEN, WIDTH = 12, 20
LAYOUTS = [FactorLayout(), FactorLayout(16, a_rows_first=True)]
Deltas = dict[tuple[object, ...], Tensor]


def _pair(num_in: int, num_out: int, rank: int) -> LoraPair:
    return LoraPair(torch.randn(rank, num_in), torch.randn(num_out, rank), 0.5)


def _expert(rank: int) -> ExpertLora:
    return ExpertLora(_pair(HIDDEN, WIDTH, rank), _pair(HIDDEN, WIDTH, rank), down=_pair(WIDTH, HIDDEN, rank))


def _weights(linears: dict[str, int], experts: dict[int, dict[int, int]], seed: int) -> AdapterWeights:
    """Random factors: module -> rank, layer -> expert -> rank."""
    torch.manual_seed(seed)
    return AdapterWeights(
        linears={name: _pair(HIDDEN, WIDTH, rank) for name, rank in linears.items()},
        experts={
            layer: {expert: _expert(rank) for expert, rank in ranks.items()} for layer, ranks in experts.items()
        },
        hashed=str, config={}, layout="", skipped=(), num_bytes=0, warnings=(),
    )  # fmt: skip


A = _weights({"q": 4, "o": 24}, {1: {0: 8, 3: 8, 5: 40}, 2: {0: 2}}, seed=1)
B = _weights({"o": 8, "kv": 16}, {1: {3: 30, 4: 8}, 4: {7: 8}}, seed=2)
C = _weights({"q": 8}, {1: {0: 8, 3: 8, 4: 8, 5: 8}}, seed=3)


def _deltas_of_files(weights: AdapterWeights) -> Deltas:
    found: Deltas = {(name,): pair.scale * pair.b @ pair.a for name, pair in weights.linears.items()}
    for layer, experts in weights.experts.items():
        for index, expert in experts.items():
            for side in ("gate", "up", "down"):
                pair = getattr(expert, side)
                found[layer, index, side] = pair.scale * pair.b @ pair.a
    return found


def _product(pages: HostPages, page: int, a: str, b: str, side: int) -> Tensor:
    stored = pages.factors[a][page]
    a_KR = stored.T if pages.a_rows_first else stored
    return (a_KR[:, side * pages.lora_rank : (side + 1) * pages.lora_rank] @ pages.factors[b][page]).T


def _deltas_of_pages(adapter: HostAdapter) -> Deltas:
    found = {(name,): _product(pages, 0, "a", "b", 0) for name, pages in adapter.linears.items()}
    sides = {"gate": ("a13", "b_gate", 0), "up": ("a13", "b_up", 1), "down": ("a2", "b2", 0)}
    for layer, by_rank in adapter.experts.items():
        for pages in by_rank:
            for page, expert in enumerate(pages.regions):
                for side, where in sides.items():
                    assert (layer, expert, side) not in found
                    found[layer, expert, side] = _product(pages, page, *where)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "rows first"])
def test_a_sum_multiplies_to_the_weighted_sum_of_what_its_files_multiply_to(layout: FactorLayout) -> None:
    parts = [(0.7, A), (-0.3, B), (1.0, C)]
    joined = compose([(weight, to_host_adapter(file, torch.float32, layout)) for weight, file in parts], 512)
    expected: Deltas = {}
    for weight, file in parts:
        for key, delta in _deltas_of_files(file).items():
            expected[key] = expected.get(key, torch.zeros_like(delta)) + weight * delta
    got = _deltas_of_pages(joined)
    assert got.keys() == expected.keys()
    for key, delta in got.items():
        torch.testing.assert_close(delta, expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "rows first"])
def test_a_sum_takes_the_bytes_of_its_parts_and_pages_as_the_device_asks(layout: FactorLayout) -> None:
    parts = [to_host_adapter(file, torch.bfloat16, layout) for file in (A, B, C)]
    joined = compose([(0.5, part) for part in parts], 512)
    assert joined.num_bytes == sum(part.num_bytes for part in parts)
    assert joined.num_expert_pages == len({(1, 0), (1, 3), (1, 4), (1, 5), (2, 0), (4, 7)})
    for pages in (*joined.linears.values(), *(pages for layer in joined.experts.values() for pages in layer)):
        assert pages.lora_rank % layout.rank_multiple == 0 and pages.a_rows_first is layout.a_rows_first
        assert pages.regions == sorted(pages.regions)
    ranks = [pages.lora_rank for pages in joined.experts[1]]
    assert ranks == sorted(set(ranks))
    padded = layout.padded_rank
    assert {expert: pages.lora_rank for pages in joined.experts[1] for expert in pages.regions} == {
        0: padded(8) + padded(8), 3: padded(8) + padded(30) + padded(8), 4: padded(8) * 2, 5: padded(40) + padded(8),
    }  # fmt: skip


def test_weights_of_one_round_nothing_and_others_round_once_from_float32() -> None:
    part = to_host_adapter(C, torch.bfloat16)
    for weight in (1.0, -1.0, 0.3):
        (pages,) = compose([(weight, part)], 512).experts[1]
        (own,) = part.experts[1]
        assert torch.equal(pages.factors["a13"], own.factors["a13"])
        expected = (own.factors["b2"].float() * weight).bfloat16()
        assert torch.equal(pages.factors["b2"], expected)
        assert torch.equal(pages.factors["b2"].abs(), own.factors["b2"].abs()) is (abs(weight) == 1.0)


def test_a_sum_shares_no_memory_with_its_parts() -> None:
    part = to_host_adapter(C, torch.float32)
    joined = compose([(1.0, part)], 512)
    joined.linears["q"].factors["a"].fill_(7.0)
    joined.experts[1][0].factors["b2"].fill_(7.0)
    assert not part.linears["q"].factors["a"].eq(7.0).any() and not part.experts[1][0].factors["b2"].eq(7.0).any()


def test_a_joined_rank_over_the_limit_is_refused_and_named() -> None:
    parts = [(1.0, to_host_adapter(file, torch.float32)) for file in (A, C)]
    compose(parts, 48)
    with pytest.raises(AdapterError, match=r"joined rank is 48 \(expert 5 of layer 1\).*47 at most"):
        compose(parts, 47)


def test_a_weight_that_overflows_the_type_is_refused() -> None:
    pair = LoraPair(torch.randn(8, HIDDEN), torch.full((WIDTH, 8), 100.0), 1.0)
    part = to_host_adapter(replace(C, linears={"q": pair}), torch.float16)
    compose([(600.0, part)], 512)
    with pytest.raises(AdapterError) as caught:
        compose([(700.0, part)], 512)
    assert caught.value.problems[0].startswith("q: factors overflow float16")
