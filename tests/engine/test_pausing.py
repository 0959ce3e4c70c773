"""A paused request waits with all it has, costs the others nothing, and goes on as if nothing had been."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from runtime.config import EngineConfig
from runtime.engine.messages import FinishReason
from runtime.engine.sampling_params import SamplingParams
from tests.oracle.base_models import Oracle
from tests.oracle.driver import Driver, driven_engine
from tests.oracle.shapes import V3, Shape

SAMPLED = SamplingParams(30, 30, temperature=1.5, seed=9, repetition_penalty=1.2, num_top_tokens=2)


@pytest.fixture(scope="module")
def base(oracle: Callable[[Shape], Oracle]) -> Oracle:
    return oracle(V3)


@pytest.fixture
def driver(base: Oracle) -> Iterator[Driver]:
    config = EngineConfig(base.path, dtype="float32", max_model_len=128, kv_cache_tokens=128, kv_block_tokens=16,
                          max_batch_tokens=32, max_batch_size=2)  # fmt: skip
    with driven_engine(config) as built:
        yield built


def _steps(driver: Driver, count: int) -> None:
    for _ in range(count):
        driver.step()


def _drain(driver: Driver) -> None:
    """Run until everything has ended and check that nothing is held."""
    driver.run()
    driver.step()
    stats = driver.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
    assert not driver.engine.has_work()


@pytest.mark.parametrize("when", [0, 1, 2, 3, 10])
def test_a_paused_request_goes_on_with_the_same_tokens(base: Oracle, driver: Driver, when: int) -> None:
    """Paused before its first step, between prompt chunks, and while it decodes."""
    prompt = base.prompt(60)
    alone = driver.add(prompt, params=SAMPLED)
    driver.run()
    paused = driver.add(prompt, params=SAMPLED)
    _steps(driver, when)
    driver.pause(paused, paused=True)
    driver.step()
    before = list(driver.outcomes[paused].tokens)
    assert not driver.engine.has_work(), "a paused request must not make the engine spin"
    _steps(driver, 3)
    assert driver.outcomes[paused].tokens == before
    driver.pause(paused, paused=False)
    assert driver.engine.has_work()
    _drain(driver)
    assert driver.outcomes[paused].tokens == driver.outcomes[alone].tokens
    assert driver.stats.preemptions == 0


def test_paused_requests_take_no_seat_and_give_up_their_blocks_first(base: Oracle, driver: Driver) -> None:
    """Two of two seats are paused and hold most of the cache; the others run, and the paused ones recover."""
    alone = [driver.generate(base.prompt(40, seed=seed), max_new_tokens=30).tokens for seed in range(4)]
    stalled = [driver.add(base.prompt(40, seed=seed), max_new_tokens=30) for seed in range(2)]
    _steps(driver, 4)
    for request_id in stalled:
        driver.pause(request_id, paused=True)
    others = [driver.add(base.prompt(40, seed=seed), max_new_tokens=30) for seed in range(2, 4)]
    driver.run(others)
    assert driver.stats.preemptions >= 1
    assert not driver.engine.has_work()
    for request_id in stalled:
        driver.pause(request_id, paused=False)
    _drain(driver)
    assert [driver.outcomes[request_id].tokens for request_id in stalled + others] == alone


def test_more_resumed_requests_than_seats_take_turns(base: Oracle, driver: Driver) -> None:
    alone = [driver.generate(base.prompt(9, seed=seed), max_new_tokens=12).tokens for seed in range(4)]
    requests = []
    for seed in range(4):
        requests.append(driver.add(base.prompt(9, seed=seed), max_new_tokens=12))
        _steps(driver, 2)
        driver.pause(requests[-1], paused=True)
    driver.step()
    assert driver.engine.stats().running == 4
    for request_id in requests:
        driver.pause(request_id, paused=False)
    seen = []
    driver.engine.runner.observe_logits = lambda ids, _: seen.append(len(ids))
    _drain(driver)
    assert max(seen) == 2
    assert [driver.outcomes[request_id].tokens for request_id in requests] == alone


def test_a_paused_request_can_be_cancelled_and_can_meet_its_deadline(base: Oracle, driver: Driver) -> None:
    cancelled = driver.add(base.prompt(20), max_new_tokens=50)
    running = driver.add(base.prompt(20), max_new_tokens=50, deadline=time.time() + 0.2)
    waiting = driver.add(base.prompt(20), max_new_tokens=50, deadline=time.time() + 0.2)
    driver.step()
    for request_id in (cancelled, running, waiting):
        driver.pause(request_id, paused=True)
    driver.step()
    stats = driver.engine.stats()
    assert (stats.running, stats.waiting, stats.estimated_wait_seconds) == (2, 1, 0.0)
    driver.cancel(cancelled)
    driver.step()
    assert not driver.engine.has_work()
    driver.engine.wait_for_work(timeout_seconds=0.0)  # commands that are taken already ring once more
    assert driver.engine.wait_for_work(timeout_seconds=5.0), "the deadline ends the sleep"
    _drain(driver)
    assert driver.outcomes[running].finish_reason is FinishReason.DEADLINE
    assert driver.outcomes[waiting].finish_reason is FinishReason.DEADLINE


def test_pausing_what_does_not_exist_and_pausing_twice_does_nothing(base: Oracle, driver: Driver) -> None:
    request_id = driver.add(base.prompt(20), max_new_tokens=5)
    for paused in (True, True, False, False):
        driver.pause(request_id, paused=paused)
    _drain(driver)
    driver.pause(request_id, paused=True)
    driver.step()
    assert len(driver.outcomes[request_id].tokens) == 5
    assert driver.generate(base.prompt(5), max_new_tokens=2).finish_reason is FinishReason.MAX_NEW_TOKENS
