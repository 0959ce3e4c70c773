"""An adapter whose weights overflow, or whose load fails, harms its own requests only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from runtime.config import EngineConfig
from runtime.engine.messages import FinishReason
from tests.oracle.adapters import AdapterRecipe, write_adapter
from tests.oracle.base_models import Oracle
from tests.oracle.driver import Driver, driven_engine
from tests.oracle.shapes import V3, Shape


@pytest.fixture(scope="module")
def base(oracle: Callable[[Shape], Oracle]) -> Oracle:
    return oracle(V3)


@pytest.fixture(scope="module")
def driver(base: Oracle) -> Iterator[Driver]:
    with driven_engine(EngineConfig(base.path, dtype="float32", max_model_len=128, kv_cache_tokens=256)) as built:
        yield built


def _overflowing(base: Oracle, folder: Path) -> Path:
    """Finite weights, too large for any product."""
    path = write_adapter(base.path, folder, AdapterRecipe(("kv_a_proj_with_mqa", "o_proj"), lora_rank=8)).path
    file = path / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file)
    return path


def test_overflow_ends_its_own_request_and_leaves_no_trace_in_the_cache(
    base: Oracle, driver: Driver, tmp_path: Path
) -> None:
    short, long = base.prompt(3, seed=1), base.prompt(90, seed=2)
    alone = driver.generate(short, max_new_tokens=8).tokens
    driver.load("overflow", _overflowing(base, tmp_path / "overflow"))
    for _ in range(3):
        failure = driver.generate(base.prompt(60, seed=3), adapter="overflow", max_new_tokens=8).failure
        assert failure is not None and failure.reason == "NON_FINITE_OUTPUT"
    together = [driver.add(prompt, max_new_tokens=8) for prompt in (short, long)]
    driver.run()
    assert driver.outcomes[together[0]].tokens == alone
    driver.unload("overflow")


def test_requests_that_wait_for_a_load_that_fails_are_told_and_others_run(
    base: Oracle, driver: Driver, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    load = driver.start_load("late", tmp_path)
    waiting = [driver.add(base.prompt(5), adapter="late", max_new_tokens=4) for _ in range(3)]
    cancelled = driver.add(base.prompt(5), adapter="late", max_new_tokens=4)
    driver.cancel(cancelled)
    other = driver.add(base.prompt(5), max_new_tokens=4)
    driver.run()
    assert driver.answered(load)
    failures = [driver.outcomes[request].failure for request in waiting]
    assert all(failure is not None and failure.reason == "ADAPTER_NOT_FOUND" for failure in failures)
    assert driver.outcomes[other].finish_reason is FinishReason.MAX_NEW_TOKENS
    assert (driver.stats.running, driver.stats.waiting, driver.stats.kv_tokens_used) == (0, 0, 0)
