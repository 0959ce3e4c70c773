"""Weighted sums of adapters, in mixed batches, against transformers with the weighted deltas merged by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.config import EngineConfig
from runtime.engine.messages import CallId, LoadAdapter, RequestId
from runtime.errors import ErrorKind
from tests.conftest import RecordNumber
from tests.oracle.adapters import KINDS, AdapterRecipe, RandomAdapter, merge_by_hand, write_adapter
from tests.oracle.base_models import Oracle, logits
from tests.oracle.driver import Driver, driven_engine
from tests.oracle.shapes import SHAPES, V3, Shape

LOGITS_TOLERANCE = 1e-4
LEAST_EFFECT = 0.05  # a part that changes no logit by this much proves nothing
NUM_NEW_TOKENS = 9
Weights = dict[str, float]

RECIPES = {
    "all": AdapterRecipe(KINDS, lora_rank=8, alpha=12.0, seed=1),
    "few": AdapterRecipe(
        ("kv_b_proj", "lm_head", "routed_experts"), lora_rank=24, seed=2,
        covers=lambda layer, expert: (layer + expert) % 3 == 0,
    ),
    "odd": AdapterRecipe(
        KINDS, lora_rank=5, alpha=7.0, use_rslora=True, seed=3, dtype=torch.bfloat16,
        rank_pattern={"kv_b_proj": 13, "o_proj": 2, r"mlp\.experts\.\d*[13]\.down_proj": 17},
        covers=lambda layer, expert: layer == 2 and expert < 11,
    ),
    "other": AdapterRecipe(KINDS, lora_rank=16, alpha=20.0, seed=4),
}  # fmt: skip
MIX: dict[str | None, Weights] = {
    "0.7*all+0.3*few": {"all": 0.7, "few": 0.3},
    "all+few": {"all": 1.0, "few": 1.0},
    "0.5*few+all+-0.4*odd": {"all": 1.0, "few": 0.5, "odd": -0.4},
    "1.5*odd": {"odd": 1.5},
    "odd+few": {"odd": 1.0, "few": 1.0},
    "all": {"all": 1.0},
    "few": {"few": 1.0},
    None: {},
}


@dataclass
class Case:
    """A base with its adapters, and an engine in which they are loaded."""

    shape: str
    base: Oracle
    adapters: dict[str, RandomAdapter]
    driver: Driver
    merged: dict[tuple[tuple[str, float], ...], torch.nn.Module] = field(default_factory=dict)

    def model(self, weights: Weights) -> torch.nn.Module:
        key = tuple(sorted(weights.items()))
        if key not in self.merged:
            deltas: dict[str, Tensor] = {}
            for name, weight in weights.items():
                for module, delta in self.adapters[name].deltas.items():
                    deltas[module] = deltas.get(module, torch.zeros_like(delta)) + weight * delta
            self.merged[key] = merge_by_hand(self.base.model, deltas)
        return self.merged[key]

    def prompt(self, place: int) -> list[int]:
        return self.base.prompt(20 + 13 * place, seed=200 + place)

    def difference(self, request_id: RequestId, prompt: list[int], weights: Weights) -> float:
        """The largest difference between a request's logits and those of merged weights."""
        outcome = self.driver.outcomes[request_id]
        assert outcome.failure is None, outcome.failure
        expected = logits(self.model(weights), prompt + outcome.tokens[:-1])[len(prompt) - 1 :]
        for name in weights:
            without = {other: weight for other, weight in weights.items() if other != name}
            apart = logits(self.model(without), prompt + outcome.tokens[:-1])[len(prompt) - 1 :]
            assert (expected - apart).abs().max() > LEAST_EFFECT
        return (torch.stack(outcome.logits) - expected).abs().max().item()


@pytest.fixture(params=SHAPES, ids=lambda shape: shape.name)
def case(request: pytest.FixtureRequest, oracle: Callable[[Shape], Oracle], tmp_path: Path) -> Iterator[Case]:
    yield from _case(request.param, oracle(request.param), tmp_path)


@pytest.fixture
def v3(oracle: Callable[[Shape], Oracle], tmp_path: Path) -> Iterator[Case]:
    yield from _case(V3, oracle(V3), tmp_path)


def _case(shape: Shape, base: Oracle, folder: Path) -> Iterator[Case]:
    adapters = {name: write_adapter(base.path, folder / name, recipe) for name, recipe in RECIPES.items()}
    config = EngineConfig(
        base.path, dtype="float32", max_model_len=256, kv_cache_tokens=2048, max_batch_tokens=64, adapter_memory_gib=0.2
    )
    with driven_engine(config) as driver:
        for name, adapter in adapters.items():
            driver.load(name, adapter.path)
        yield Case(shape.name, base, adapters, driver)


def test_sums_equal_merged_weights_in_a_batch_with_single_adapters_and_the_base(
    case: Case, record_number: RecordNumber
) -> None:
    """Prompts run in chunks of 64 tokens, all requests at once; sums are made while others run."""
    running = {}
    for place, (expression, weights) in enumerate(MIX.items()):
        request_id = case.driver.add(case.prompt(place), adapter=expression, max_new_tokens=NUM_NEW_TOKENS)
        running[request_id] = (case.prompt(place), weights)
    case.driver.run()
    worst = max(case.difference(request_id, *asked) for request_id, asked in running.items())
    record_number(f"{case.shape}: sums of 2 and 3 in a mixed batch, vs merged by hand", worst, at_most=LOGITS_TOLERANCE)


def test_a_part_replaced_meanwhile_leaves_running_requests_the_old_sum_and_gives_new_ones_the_new(
    v3: Case, record_number: RecordNumber
) -> None:
    expression = "0.7*all+0.3*few"
    prompt = v3.prompt(0)
    old = v3.driver.add(prompt, adapter=expression, max_new_tokens=60)
    while len(v3.driver.outcomes[old].tokens) < 5:
        v3.driver.step()
    replacing = CallId(10**6)
    v3.driver.engine.submit(LoadAdapter(replacing, "all", str(v3.adapters["other"].path), replace=True))
    while not v3.driver.answered(replacing):
        v3.driver.step()
    assert not v3.driver.outcomes[old].ended
    new = v3.driver.add(prompt, adapter=expression, max_new_tokens=NUM_NEW_TOKENS)
    v3.driver.run()
    differences = [
        v3.difference(old, prompt, {"all": 0.7, "few": 0.3}),
        v3.difference(new, prompt, {"other": 0.7, "few": 0.3}),
    ]
    worst = max(differences)
    record_number("a part replaced meanwhile, logits of both vs merged by hand", worst, at_most=LOGITS_TOLERANCE)


def test_a_named_sum_equals_the_sum_and_can_be_a_part_itself(v3: Case, record_number: RecordNumber) -> None:
    composing = CallId(10**6)
    v3.driver.engine.submit(LoadAdapter(composing, "mix", expression="0.5*few+all"))
    while not v3.driver.answered(composing):
        v3.driver.step()
    prompt = v3.prompt(1)
    mix = v3.driver.add(prompt, adapter="mix", max_new_tokens=NUM_NEW_TOKENS)
    nested = v3.driver.add(prompt, adapter="0.4*mix+odd", max_new_tokens=NUM_NEW_TOKENS)
    v3.driver.run()
    differences = [
        v3.difference(mix, prompt, {"all": 1.0, "few": 0.5}),
        v3.difference(nested, prompt, {"all": 0.4, "few": 0.2, "odd": 1.0}),
    ]
    record_number("a named sum and a sum with it, logits vs merged by hand", max(differences), at_most=LOGITS_TOLERANCE)


def test_a_missing_part_ends_the_request_and_leaves_nothing(v3: Case) -> None:
    outcome = v3.driver.generate(v3.prompt(0), adapter="all+nobody")
    assert outcome.failure is not None
    assert (outcome.failure.kind, outcome.failure.field) == (ErrorKind.NOT_FOUND, "adapter_id")
    assert "'nobody' is not loaded" in outcome.failure.message
    v3.driver.generate(v3.prompt(0), adapter="all+few")
    for name in RECIPES:
        v3.driver.unload(name)
    v3.driver.step()
    stats = v3.driver.engine.stats()
    assert (stats.adapters_resident, stats.adapter_device_bytes, stats.adapter_host_bytes) == (0, 0, 0)
