"""A request's output depends on its own adapter only, whatever else runs, is cancelled, loaded or unloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from runtime.config import EngineConfig
from runtime.engine.messages import RequestId
from runtime.errors import ErrorKind
from tests.conftest import RecordNumber
from tests.oracle.adapters import ATTENTION, KINDS, AdapterRecipe, write_adapter
from tests.oracle.base_models import Oracle
from tests.oracle.driver import Driver, driven_engine
from tests.oracle.shapes import V3, Shape

EXPERTS_ONLY = ("routed_experts",)
EIGHT_ADAPTERS = {
    "experts-4": AdapterRecipe(EXPERTS_ONLY, lora_rank=4, seed=1),
    "experts-8-one-in-ten": AdapterRecipe(
        EXPERTS_ONLY, lora_rank=8, seed=2, covers=lambda layer, expert: (3 * layer + expert) % 10 == 0
    ),
    "experts-16-one-layer": AdapterRecipe(EXPERTS_ONLY, lora_rank=16, seed=3, covers=lambda layer, expert: layer == 2),
    "experts-32-half": AdapterRecipe(EXPERTS_ONLY, lora_rank=32, seed=4, covers=lambda layer, expert: expert % 2 == 1),
    "everything-8": AdapterRecipe(KINDS, lora_rank=8, seed=5),
    "everything-12-patterns": AdapterRecipe(KINDS, lora_rank=12, seed=6, rank_pattern={"kv_b_proj": 2, "up_proj": 5}),
    "attention-64": AdapterRecipe(ATTENTION, lora_rank=64, alpha=32.0, seed=7),
    "kv-b-and-head-16": AdapterRecipe(("kv_b_proj", "lm_head"), lora_rank=16, seed=8),
}
LATE = ("late", AdapterRecipe(("routed_experts", "o_proj"), lora_rank=16, seed=9))
ROOMY = {"max_batch_tokens": 512, "kv_cache_tokens": 1024}
TIGHT = {"max_batch_tokens": 24, "max_batch_size": 24, "kv_cache_tokens": 512, "kv_block_tokens": 16}


@dataclass(frozen=True)
class Ask:
    """One request of the mix."""

    prompt: list[int]
    adapter: str | None
    max_new_tokens: int


@pytest.fixture(scope="module")
def base(oracle: Callable[[Shape], Oracle]) -> Oracle:
    return oracle(V3)


@pytest.fixture(scope="module")
def adapters(base: Oracle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("eight")
    recipes = {**EIGHT_ADAPTERS, LATE[0]: LATE[1]}
    return {name: write_adapter(base.path, folder / name, recipe).path for name, recipe in recipes.items()}


@pytest.fixture(scope="module")
def roomy(base: Oracle, adapters: dict[str, Path]) -> Iterator[Driver]:
    """An engine where each request runs alone: one chunk, no preemption."""
    with driven_engine(_config(base, **ROOMY)) as driver:
        for name, path in adapters.items():
            driver.load(name, path)
        yield driver


def _config(base: Oracle, **settings: int) -> EngineConfig:
    return EngineConfig(base.path, dtype="float32", max_model_len=256, adapter_memory_gib=0.2, **settings)  # type: ignore[arg-type]


def _asks(base: Oracle) -> list[Ask]:
    """Three requests for each adapter and six for the base, of very different lengths, in a mixed order."""
    names = [*EIGHT_ADAPTERS, None, None] * 3
    lengths = [3 + (37 * index) % 90 for index in range(len(names))]
    return [
        Ask(base.prompt(length, seed=100 + index), name, 20 + (7 * index) % 24)
        for index, (name, length) in enumerate(zip(names, lengths, strict=True))
    ]


def _add(driver: Driver, ask: Ask) -> RequestId:
    return driver.add(ask.prompt, adapter=ask.adapter, max_new_tokens=ask.max_new_tokens)


def _alone(driver: Driver, ask: Ask) -> list[int]:
    outcome = driver.generate(ask.prompt, adapter=ask.adapter, max_new_tokens=ask.max_new_tokens)
    assert outcome.failure is None
    return outcome.tokens


def test_a_mixed_batch_gives_each_request_the_tokens_it_gets_alone(
    base: Oracle,
    adapters: dict[str, Path],
    roomy: Driver,
    record_number: RecordNumber,
) -> None:
    """Prefill chunks of 24 tokens, preemption, cancellations, a load and an unload, all while 30 requests run."""
    asks = _asks(base)
    with driven_engine(_config(base, **TIGHT)) as driver:
        for name in EIGHT_ADAPTERS:
            driver.load(name, adapters[name])
        running = {_add(driver, ask): ask for ask in asks}
        cancelled = {_add(driver, ask) for ask in asks[1:12:3]}
        _steps(driver, 12)
        late_load = driver.start_load(LATE[0], adapters[LATE[0]])
        for request_id in cancelled:
            driver.cancel(request_id)
        while not driver.answered(late_load):
            driver.step()
        late_ask = Ask(base.prompt(40, seed=500), LATE[0], 24)
        running[_add(driver, late_ask)] = late_ask
        _steps(driver, 6)
        gone = asks[0].adapter
        assert gone is not None
        unload = driver.start_unload(gone)
        _steps(driver, 1)
        refused = driver.add(base.prompt(5), adapter=gone)
        driver.run()
        assert driver.answered(unload)
        refusal = driver.outcomes[refused].failure
        assert refusal is not None and refusal.kind is ErrorKind.NOT_FOUND
        wrong = [
            f"{ask.adapter}: {driver.outcomes[request_id]}"
            for request_id, ask in running.items()
            if driver.outcomes[request_id].tokens != _alone(roomy, ask)
        ]
        _assert_nothing_is_held(driver)
        record_number("mixed batch: preemptions that happened", driver.stats.preemptions, at_least=1)
        record_number("mixed batch: requests that differ from alone, of 31", len(wrong), at_most=0)


def test_adapters_change_what_requests_get(base: Oracle, roomy: Driver) -> None:
    """Guards the comparison above: with the same prompt, no two of the adapters and the base agree."""
    prompt = base.prompt(30, seed=900)
    answers = {tuple(_alone(roomy, Ask(prompt, name, 24))) for name in [*EIGHT_ADAPTERS, LATE[0], None]}
    assert len(answers) == len(EIGHT_ADAPTERS) + 2


def test_base_requests_are_bit_identical_with_and_without_adapters(
    base: Oracle,
    roomy: Driver,
    record_number: RecordNumber,
) -> None:
    """Also right after a batch that used adapters: nothing of them may be left behind."""
    asks = [Ask(base.prompt(10 + 31 * index, seed=700 + index), None, 24) for index in range(5)]
    mixed = [_add(roomy, Ask(base.prompt(9, seed=600), name, 6)) for name in EIGHT_ADAPTERS]
    roomy.run()
    assert all(roomy.outcomes[request_id].failure is None for request_id in mixed)
    with driven_engine(_config(base, **ROOMY)) as plain:
        pairs = [_together(driver, asks) for driver in (plain, roomy)]
    different = sum(not torch.equal(a, b) for a, b in zip(*pairs, strict=True))
    assert all(len(rows) == 24 for rows in pairs[0])
    record_number("base-only batch: requests whose logits differ in any bit, of 5", different, at_most=0)


def _together(driver: Driver, asks: list[Ask]) -> list[torch.Tensor]:
    ids = [_add(driver, ask) for ask in asks]
    driver.run()
    return [torch.stack(driver.outcomes[request_id].logits) for request_id in ids]


def _steps(driver: Driver, count: int) -> None:
    for _ in range(count):
        driver.step()


def _assert_nothing_is_held(driver: Driver) -> None:
    driver.step()
    stats = driver.stats
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
