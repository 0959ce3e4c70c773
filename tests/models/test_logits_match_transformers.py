"""The engine's logits against transformers' for the same files: prefill, paged decode, and far positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from runtime.config import EngineConfig
from runtime.engine.scoring import score
from tests.conftest import RecordNumber
from tests.oracle.base_models import Oracle, logits
from tests.oracle.driver import Driver, driven_engine
from tests.oracle.shapes import SHAPES, Shape

LOGITS_TOLERANCE = 1e-4
NUM_PROMPT_TOKENS = 512
NUM_DECODE_STEPS = 64
NUM_FAR_TOKENS = 4_200  # beyond the 4,096 that YaRN stretches from
NUM_FAR_COMPARED = 104


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def base(request: pytest.FixtureRequest, oracle: Callable[[Shape], Oracle]) -> Oracle:
    return oracle(request.param)


@pytest.fixture(scope="module")
def driver(base: Oracle) -> Iterator[Driver]:
    config = EngineConfig(
        base.path,
        dtype="float32",
        max_model_len=4_608,
        kv_cache_tokens=4_608,
        max_batch_tokens=384,
        adapter_memory_gib=0.01,
    )
    with driven_engine(config) as driver:
        yield driver


def test_prefill_logits_equal_transformers(base: Oracle, driver: Driver, record_number: RecordNumber) -> None:
    prompt = base.prompt(NUM_PROMPT_TOKENS)
    seen = score(driver.engine, prompt, None)
    difference = (seen.float() - logits(base.model, prompt)).abs().max().item()
    record_number(
        f"{base.shape.name}: prefill of {NUM_PROMPT_TOKENS}, logits vs transformers",
        difference,
        at_most=LOGITS_TOLERANCE,
    )


def test_decode_logits_equal_transformers_at_every_step(
    base: Oracle, driver: Driver, record_number: RecordNumber
) -> None:
    prompt = base.prompt(NUM_PROMPT_TOKENS, seed=1)
    outcome = driver.generate(prompt, max_new_tokens=NUM_DECODE_STEPS + 1)
    assert len(outcome.logits) == len(outcome.tokens) == NUM_DECODE_STEPS + 1
    expected = logits(base.model, prompt + outcome.tokens[:-1])[len(prompt) - 1 :]
    difference = (torch.stack(outcome.logits) - expected).abs().max().item()
    record_number(
        f"{base.shape.name}: {NUM_DECODE_STEPS} decode steps, logits vs transformers",
        difference,
        at_most=LOGITS_TOLERANCE,
    )


def test_logits_beyond_position_4096_equal_transformers(
    base: Oracle, driver: Driver, record_number: RecordNumber
) -> None:
    """The prompt runs in chunks; its last positions, and decode steps after it, are compared."""
    prompt = base.prompt(NUM_FAR_TOKENS, seed=2)
    scored = score(driver.engine, prompt, None)[-NUM_FAR_COMPARED:]
    outcome = driver.generate(prompt, max_new_tokens=8)
    expected = logits(base.model, prompt + outcome.tokens[:-1])
    prefill = (scored.float() - expected[NUM_FAR_TOKENS - NUM_FAR_COMPARED : NUM_FAR_TOKENS]).abs().max().item()
    decode = (torch.stack(outcome.logits) - expected[NUM_FAR_TOKENS - 1 :]).abs().max().item()
    record_number(
        f"{base.shape.name}: positions up to {NUM_FAR_TOKENS + 7}, logits vs transformers",
        max(prefill, decode),
        at_most=LOGITS_TOLERANCE,
    )


def test_logits_are_far_from_flat(base: Oracle) -> None:
    """Guards the comparisons: a tolerance means something only where logits differ by far more."""
    assert logits(base.model, base.prompt(64)).std(dim=-1).min() > 0.75
