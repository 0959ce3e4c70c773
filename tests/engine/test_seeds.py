"""A seed gives the same text alone, in a batch of 16 with other parameters, and after preemption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime.config import EngineConfig
from runtime.engine.sampling_params import SamplingParams
from tests.conftest import RecordNumber
from tests.oracle.adapters import KINDS, AdapterRecipe, write_adapter
from tests.oracle.base_models import Oracle
from tests.oracle.driver import Driver, driven_engine
from tests.oracle.shapes import V3, Shape

NUM_REQUESTS = 16
NEW = 40
ROOMY = {"max_batch_tokens": 1024, "kv_cache_tokens": 2048}
TIGHT = {"max_batch_tokens": 24, "max_batch_size": 20, "kv_cache_tokens": 512, "kv_block_tokens": 16}
# One for each parameter, then all at once, warm enough that neighbouring seeds part at once.
MIX: tuple[dict[str, float], ...] = (
    {"temperature": 1.5},
    {"temperature": 2.0, "top_k": 20},
    {"temperature": 2.0, "top_p": 0.9},
    {"temperature": 1.5, "typical_p": 0.9},
    {"temperature": 1.5, "repetition_penalty": 1.5},
    {"temperature": 1.5, "length_penalty_start": 10, "length_penalty_factor": 1.1},
    {"repetition_penalty": 1.3, "min_new_tokens": 10, "length_penalty_factor": 1.05},
    {"temperature": 3.0, "top_k": 100, "top_p": 0.95, "typical_p": 0.95, "repetition_penalty": 1.2,
     "min_new_tokens": 30, "length_penalty_start": 5, "length_penalty_factor": 1.2, "num_top_tokens": 3},
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    prompt: list[int]
    adapter: str | None
    params: SamplingParams


@pytest.fixture(scope="module")
def base(oracle: Callable[[Shape], Oracle]) -> Oracle:
    return oracle(V3)


@pytest.fixture(scope="module")
def adapter(base: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base.path, tmp_path_factory.mktemp("adapter") / "all", AdapterRecipe(KINDS)).path


@pytest.fixture(scope="module")
def roomy(base: Oracle, adapter: Path) -> Iterator[Driver]:
    yield from _driver(base, adapter, ROOMY)


@pytest.fixture(scope="module")
def tight(base: Oracle, adapter: Path) -> Iterator[Driver]:
    yield from _driver(base, adapter, TIGHT)


def _driver(base: Oracle, adapter: Path, settings: dict[str, int]) -> Iterator[Driver]:
    config = EngineConfig(base.path, dtype="float32", max_model_len=256, **settings)  # type: ignore[arg-type]
    with driven_engine(config) as driver:
        driver.load("all", adapter)
        yield driver


def _asks(base: Oracle) -> list[Ask]:
    """The same two prompts for all, so that only seed, parameters and adapter tell requests apart."""
    prompts = [base.prompt(30, seed=1), base.prompt(70, seed=2)]
    return [
        Ask(
            prompts[index % 2],
            "all" if index % 3 == 0 else None,
            SamplingParams(NEW, seed=index // 8, **MIX[index % len(MIX)]),  # type: ignore[arg-type]
        )
        for index in range(NUM_REQUESTS)
    ]


def _together(driver: Driver, asks: list[Ask]) -> list[list[int]]:
    ids = [driver.add(ask.prompt, adapter=ask.adapter, params=ask.params) for ask in asks]
    driver.run()
    assert all(driver.outcomes[request_id].failure is None for request_id in ids)
    return [driver.outcomes[request_id].tokens for request_id in ids]


def test_a_seed_gives_the_same_text_alone_and_in_a_batch_of_16(
    base: Oracle, roomy: Driver, tight: Driver, record_number: RecordNumber
) -> None:
    asks = _asks(base)
    alone = [_together(roomy, [ask])[0] for ask in asks]
    batch = _together(roomy, asks)
    crowded = _together(tight, asks[::-1])[::-1]
    record_number("seeds: texts that differ in a batch of 16 from alone", _num_different(alone, batch), at_most=0)
    record_number("seeds: the same under preemption and small chunks", _num_different(alone, crowded), at_most=0)
    record_number("seeds: preemptions that happened", tight.stats.preemptions, at_least=1)


def test_another_seed_gives_another_text(base: Oracle, roomy: Driver) -> None:
    """Guards the comparison above: the numbers drawn decide."""
    params = [SamplingParams(NEW, NEW, seed=seed, **MIX[0]) for seed in range(8)]  # type: ignore[arg-type]
    texts = _together(roomy, [Ask(base.prompt(30, seed=1), None, item) for item in params])
    assert len({tuple(text) for text in texts}) == len(params)


def _num_different(first: list[list[int]], second: list[list[int]]) -> int:
    return sum(a != b for a, b in zip(first, second, strict=True))
