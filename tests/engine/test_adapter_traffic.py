"""Requests while adapters are replaced, evicted, unloaded by force, or short of slots: each gets its own answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.config import EngineConfig
from runtime.engine.messages import CallId, FinishReason, LoadAdapter, RequestId, UnloadAdapter
from runtime.engine.sampling_params import SamplingParams
from tests.conftest import RecordNumber
from tests.oracle.adapters import AdapterRecipe, write_adapter
from tests.oracle.base_models import Oracle
from tests.oracle.driver import Driver, driven_engine
from tests.oracle.shapes import V3, Shape

NUM_FILES = 8
NUM_NAMES = 100
NUM_REQUESTS = 250
NUM_TOKENS = 6
NUM_AT_ONCE = 12


@pytest.fixture(scope="module")
def base(oracle: Callable[[Shape], Oracle]) -> Oracle:
    return oracle(V3)


@pytest.fixture(scope="module")
def files(base: Oracle, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters that change the output beyond any doubt: each answers the prompt in its own way."""
    folder = tmp_path_factory.mktemp("traffic")
    recipes = [AdapterRecipe(("routed_experts", "lm_head"), 8, alpha=64.0, seed=seed) for seed in range(NUM_FILES)]
    return [write_adapter(base.path, folder / str(seed), recipe).path for seed, recipe in enumerate(recipes)]


def _config(base: Oracle, **settings: object) -> EngineConfig:
    return EngineConfig(base.path, dtype="float32", max_model_len=64, kv_cache_tokens=1024, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected(base: Oracle, files: list[Path]) -> list[list[int]]:
    """What each file answers when it is alone; no two answer alike."""
    answers = []
    with driven_engine(_config(base)) as driver:
        for path in files:
            driver.load("alone", path)
            answers.append(driver.generate(base.prompt(5), adapter="alone", max_new_tokens=NUM_TOKENS).tokens)
            driver.unload("alone")
    assert len({tuple(answer) for answer in answers}) == NUM_FILES
    return answers


@pytest.fixture
def driver(base: Oracle) -> Iterator[Driver]:
    with driven_engine(_config(base, max_adapters=3, max_batch_size=8)) as built:
        yield built


def _ask(driver: Driver, base: Oracle, adapter: str) -> RequestId:
    return driver.add(base.prompt(5), adapter=adapter, max_new_tokens=NUM_TOKENS)


def test_each_request_is_answered_by_one_generation_however_often_it_is_replaced(
    base: Oracle, files: list[Path], expected: list[list[int]], driver: Driver, record_number: RecordNumber
) -> None:
    """Twelve replacements among requests: the tokens are those of the generation that the engine says, to the last."""
    file_of = {driver.load("x", files[0]).generation: 0}
    asked: list[RequestId] = []
    for turn in range(1, 13):
        call = CallId(1000 + turn)
        path = str(files[turn % NUM_FILES])
        driver.engine.submit(LoadAdapter(call, "x", path, replace=True))
        while not driver.answered(call):
            asked += [_ask(driver, base, "x") for _ in range(2)]
            driver.step()
        file_of[driver.reply(call).adapters[0].generation] = turn % NUM_FILES
    driver.run()
    wrong = [
        request for request in asked
        if driver.outcomes[request].tokens != expected[file_of[driver.outcomes[request].generation]]
    ]  # fmt: skip
    served = {driver.outcomes[request].generation for request in asked}
    record_number("replacements: requests answered by another generation", len(wrong), at_most=0)
    record_number("replacements: generations that answered", len(served), at_least=6)
    assert [info.generation for info in driver.engine.adapters.infos()] == [max(file_of)]


def test_a_replacement_that_is_refused_is_not_noticed_by_requests(
    base: Oracle, files: list[Path], expected: list[list[int]], driver: Driver, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    driver.load("x", files[1])
    running = _ask(driver, base, "x")
    driver.engine.submit(LoadAdapter(CallId(500), "x", str(tmp_path), replace=True))
    while not driver.answered(CallId(500)):
        driver.step()
    later = _ask(driver, base, "x")
    driver.run()
    assert [driver.outcomes[request].tokens for request in (running, later)] == [expected[1]] * 2


def test_an_unload_by_force_ends_its_own_requests_only_and_frees_all(
    base: Oracle, files: list[Path], expected: list[list[int]], driver: Driver
) -> None:
    driver.load("x", files[0])
    driver.load("y", files[1])
    doomed = [_ask(driver, base, "x") for _ in range(3)]
    other = _ask(driver, base, "y")
    driver.step()
    driver.engine.submit(UnloadAdapter(CallId(500), "x", force=True))
    driver.step()
    assert driver.answered(CallId(500)) and driver.reply(CallId(500)).adapters[0].freed_device_bytes > 0
    failures = [driver.outcomes[request].failure for request in doomed]
    assert [failure.reason if failure else "" for failure in failures] == ["ADAPTER_UNLOADED"] * 3
    driver.run()
    assert driver.outcomes[other].tokens == expected[1]
    driver.unload("y")
    assert driver.engine.adapters.pages.num_bytes == 0


def test_a_hundred_registered_adapters_over_four_slots_all_answer_right(
    base: Oracle, files: list[Path], expected: list[list[int]], record_number: RecordNumber
) -> None:
    """Zipf traffic; host memory holds a tenth of them, so that adapters come from disk again and again."""
    draw = random.Random(1)
    names = [f"a{index}" for index in range(NUM_NAMES)]
    weights = [1 / (index + 1) for index in range(NUM_NAMES)]
    settings = {"max_adapters": 4, "max_batch_size": 16, "adapter_cycle_seconds": 0.05}
    with driven_engine(_config(base, **settings)) as driver:
        size = driver.load("size", files[0]).device_bytes
        driver.unload("size")
        driver.engine.adapters.memory.host.max_bytes = 10 * size
        for index, name in enumerate(names):
            call = LoadAdapter(CallId(1000 + index), name, str(files[index % NUM_FILES]), lazy=True)
            driver.engine.submit(call)
        wanted: dict[RequestId, int] = {}
        for _ in range(NUM_REQUESTS):
            while sum(not driver.outcomes[request].ended for request in wanted) > NUM_AT_ONCE:
                driver.step()
            index = draw.choices(range(NUM_NAMES), weights)[0]
            wanted[_ask(driver, base, names[index])] = index % NUM_FILES
            driver.step()
            tiers = driver.engine.adapters.memory
            assert len({info.slot for info in driver.engine.adapters.infos()} - {-1}) <= 4
            assert tiers.host.used_bytes <= 10 * size and driver.engine.adapters.pages.num_bytes <= 4 * size
        driver.run()
        wrong = [request for request, file in wanted.items() if driver.outcomes[request].tokens != expected[file]]
        record_number("100 adapters over 4 slots: wrong answers", len(wrong), at_most=0)
        counts = tiers.device.counts
        record_number("100 adapters over 4 slots: evictions from the device", counts.evictions, at_least=20)
        record_number("100 adapters over 4 slots: requests that met their adapter there", counts.hits, at_least=5)
        record_number("100 adapters over 4 slots: evictions from host memory", tiers.host.counts.evictions, at_least=5)
        for name in names:
            driver.unload(name)
        assert (driver.engine.adapters.pages.num_bytes, driver.engine.adapters.host_bytes) == (0, 0)
        assert driver.engine.stats().adapters_resident == 0


def test_nobody_waits_for_the_adapter_of_another(
    base: Oracle, files: list[Path], expected: list[list[int]]
) -> None:
    """One adapter holds the only slot; another one's request waits; the base and the first one go on meanwhile."""
    with driven_engine(_config(base, max_adapters=1, adapter_cycle_seconds=1000.0)) as driver:
        driver.load("x", files[0])
        driver.load("y", files[1])
        long = SamplingParams(max_new_tokens=40, min_new_tokens=40)
        running = driver.add(base.prompt(5), adapter="x", params=long)
        driver.step()
        waiting = _ask(driver, base, "y")
        others = [_ask(driver, base, "x"), driver.add(base.prompt(5), max_new_tokens=4)]
        driver.run(others)
        assert not driver.outcomes[waiting].ended and not driver.outcomes[running].ended
        driver.run()
        assert driver.outcomes[waiting].tokens == expected[1]


def test_a_steady_stream_for_one_adapter_does_not_starve_another(
    base: Oracle, files: list[Path], expected: list[list[int]]
) -> None:
    """There is always a request for x, so that its slot never falls free by itself."""
    settings = {"max_adapters": 1, "adapter_cycle_seconds": 0.02, "max_batch_size": 2}
    with driven_engine(_config(base, **settings)) as driver:
        driver.load("x", files[0])
        driver.load("y", files[1])
        steady = [_ask(driver, base, "x")]
        driver.step()
        waiting = _ask(driver, base, "y")
        for _ in range(2000):
            if driver.outcomes[waiting].ended:
                break
            if sum(not driver.outcomes[request].ended for request in steady) < 3:
                steady.append(_ask(driver, base, "x"))
            driver.step()
        assert driver.outcomes[waiting].tokens == expected[1]
        driver.run()
        assert all(driver.outcomes[request].tokens == expected[0] for request in steady)


def test_a_flood_on_one_adapter_holds_up_another_by_one_turn(
    base: Oracle, files: list[Path], expected: list[list[int]], record_number: RecordNumber
) -> None:
    """Steps from arrival to end, for a request of its own adapter behind 60 others, with two places in a batch."""
    with driven_engine(_config(base, max_batch_size=2)) as driver:
        for name, path in zip(("flooding", "other"), files, strict=False):
            driver.load(name, path)
        flood = [_ask(driver, base, "flooding") for _ in range(60)]
        worst = 0
        for lead in range(4):
            for _ in range(lead):
                driver.step()
            single, began = _ask(driver, base, "other"), driver.stats.steps
            driver.run([single])
            assert driver.outcomes[single].tokens == expected[1]
            worst = max(worst, driver.stats.steps - began)
        assert sum(not driver.outcomes[request].ended for request in flood) > 30
        # Two turns of six tokens at most before it (the head of the queue may have the first), and its own.
        record_number("a request behind 60 of another adapter: steps to its end", worst, at_most=3 * NUM_TOKENS + 3)
        driver.run()
        assert all(driver.outcomes[request].tokens == expected[0] for request in flood)


def test_who_waits_too_long_for_a_slot_is_refused_with_the_numbers(
    base: Oracle, files: list[Path], expected: list[list[int]]
) -> None:
    settings = {"max_adapters": 1, "adapter_cycle_seconds": 1000.0, "max_adapter_wait_seconds": 0.05}
    with driven_engine(_config(base, **settings)) as driver:
        driver.load("x", files[0])
        driver.load("y", files[1])
        running = driver.add(base.prompt(5), adapter="x", params=SamplingParams(max_new_tokens=50, min_new_tokens=50))
        driver.step()
        driver.pause(running, paused=True)
        refused = _ask(driver, base, "y")
        driver.run([refused])
        failure = driver.outcomes[refused].failure
        assert failure is not None and failure.reason == "ADAPTER_WAIT_TIMEOUT"
        assert "1 of 1 slots" in failure.message
        driver.pause(running, paused=False)
        driver.run()
        assert driver.outcomes[running].finish_reason is FinishReason.MAX_NEW_TOKENS
        assert driver.generate(base.prompt(5), adapter="y", max_new_tokens=NUM_TOKENS).tokens == expected[1]
