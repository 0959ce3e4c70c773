"""Log-probabilities, ranks and alternatives of prompt and output equal those of the transformers model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.config import EngineConfig
from runtime.engine.messages import RequestId, SequenceOutput, TokenScore
from runtime.engine.runner import MAX_SCORED_ROWS
from runtime.engine.sampling_params import SamplingParams
from tests.conftest import RecordNumber
from tests.oracle.adapters import KINDS, AdapterRecipe, merge_by_hand, write_adapter
from tests.oracle.base_models import Oracle, logits
from tests.oracle.driver import Driver, Outcome, driven_engine
from tests.oracle.shapes import V3, Shape

NUM_TOP = 5
TOLERANCE = 1e-4
HEAD = ("lm_head", "routed_experts", "kv_b_proj")
ROOMY = {"max_batch_tokens": 512, "kv_cache_tokens": 1024}
# Room for one long sequence and a little more: what runs beside it is preempted.
TIGHT = {"max_batch_tokens": 24, "max_batch_size": 24, "kv_cache_tokens": 272, "kv_block_tokens": 16}


@pytest.fixture(scope="module")
def base(oracle: Callable[[Shape], Oracle]) -> Oracle:
    return oracle(V3)


@pytest.fixture(scope="module")
def adapter(base: Oracle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """An adapter that also changes the head, and the base with it merged in."""
    drawn = write_adapter(base.path, tmp_path_factory.mktemp("adapter") / "head", AdapterRecipe(HEAD, lora_rank=8))
    return drawn.path, Oracle(base.shape, base.path, merge_by_hand(base.model, drawn.deltas))


@pytest.fixture(scope="module")
def roomy(base: Oracle, adapter: tuple[Path, Oracle]) -> Iterator[Driver]:
    yield from _driver(base, adapter[0], ROOMY)


@pytest.fixture(scope="module")
def tight(base: Oracle, adapter: tuple[Path, Oracle]) -> Iterator[Driver]:
    yield from _driver(base, adapter[0], TIGHT)


@pytest.fixture(params=["roomy", "tight"])
def driver(request: pytest.FixtureRequest) -> Driver:
    built: Driver = request.getfixturevalue(request.param)
    return built


def _driver(base: Oracle, adapter: Path, settings: dict[str, int]) -> Iterator[Driver]:
    config = EngineConfig(base.path, dtype="float32", max_model_len=256, **settings)  # type: ignore[arg-type]
    with driven_engine(config) as built:
        built.load("head", adapter)
        yield built


def _params(seed: int, new: int = 20) -> SamplingParams:
    """Sampled far from greedy, so that tokens of every rank are seen."""
    return SamplingParams(new, new, temperature=4.0, seed=seed, logprobs=True, num_top_tokens=NUM_TOP,
                          score_prompt=True)  # fmt: skip


def _true_logprobs(oracle: Oracle, token_ids: list[int]) -> Tensor:
    """Row i: log-softmax after the first i + 1 tokens, [T, vocabulary]."""
    return logits(oracle.model, token_ids).log_softmax(-1)


def _worst(scores: list[TokenScore] | list[SequenceOutput], tokens: list[int], logprobs_TV: Tensor) -> float:
    """The largest difference of any log-probability; ranks and alternatives are compared up to such differences."""
    worst = 0.0
    for score, token, row in zip(scores, tokens, logprobs_TV, strict=True):
        true = float(row[token])
        worst = max(worst, abs(score.logprob - true))
        assert (row > true + TOLERANCE).sum() < score.rank <= (row > true - TOLERANCE).sum() + 1
        assert len(score.top_tokens) == NUM_TOP
        for top, value in zip(score.top_tokens, row.topk(NUM_TOP).values.tolist(), strict=True):
            worst = max(worst, abs(top.logprob - value), abs(float(row[top.token_id]) - value))
    return worst


def _check(outcome: Outcome, prompt: list[int], oracle: Oracle) -> float:
    logprobs = _true_logprobs(oracle, prompt + outcome.tokens[:-1])
    split = len(prompt) - 1
    return max(
        _worst(outcome.prompt_scores, prompt[1:], logprobs[:split]),
        _worst(outcome.outputs, outcome.tokens, logprobs[split:]),
    )


def test_prompt_and_output_are_scored_as_transformers_does(
    base: Oracle, adapter: tuple[Path, Oracle], driver: Driver, record_number: RecordNumber
) -> None:
    """Twelve requests at once, with and without an adapter on the head, prompts of 1 token to beyond one slice."""
    lengths = (1, 2, 3, 24, 25, 40, 64, 65, 66, 90, 130, 200)
    assert any(length > 2 * MAX_SCORED_ROWS for length in lengths)
    asked: dict[RequestId, tuple[list[int], Oracle]] = {}
    for index, length in enumerate(lengths):
        prompt, uses_adapter = base.prompt(length, seed=index), index % 2 == 1
        request_id = driver.add(prompt, adapter="head" if uses_adapter else None, params=_params(index))
        asked[request_id] = (prompt, adapter[1] if uses_adapter else base)
    driver.run()
    worst = max(_check(driver.outcomes[request_id], *item) for request_id, item in asked.items())
    limits = driver.engine.scheduler.limits
    name = f"log-probabilities of prompt and output, steps of {limits.max_batch_tokens}: largest difference"
    record_number(name, worst, at_most=TOLERANCE)
    if limits.max_batch_tokens == TIGHT["max_batch_tokens"]:
        record_number("scored requests: preemptions that happened", driver.stats.preemptions, at_least=1)


def test_a_half_scored_prompt_is_not_scored_twice_after_preemption(base: Oracle, tight: Driver) -> None:
    """Paused in the middle of its prompt, robbed of its blocks by another request, then resumed."""
    prompt = base.prompt(200, seed=50)
    scored = tight.add(prompt, params=_params(1, new=4))
    tight.step()
    tight.pause(scored, paused=True)
    num_before, num_preemptions = len(tight.outcomes[scored].prompt_scores), tight.stats.preemptions
    tight.generate(base.prompt(200, seed=51), max_new_tokens=2)
    assert num_before == TIGHT["max_batch_tokens"] and tight.stats.preemptions == num_preemptions + 1
    tight.pause(scored, paused=False)
    tight.run()
    assert _check(tight.outcomes[scored], prompt, base) <= TOLERANCE


def test_prompts_are_scored_only_on_request(base: Oracle, driver: Driver) -> None:
    outcome = driver.generate(base.prompt(30), max_new_tokens=3)
    assert outcome.prompt_scores == [] and all(output.rank == 0 for output in outcome.outputs)


def test_a_prompt_that_overflows_ends_its_request_alone_and_tells_no_scores(
    base: Oracle, driver: Driver, tmp_path: Path
) -> None:
    path = write_adapter(base.path, tmp_path / "overflow", AdapterRecipe(KINDS, lora_rank=8)).path
    file = path / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file)
    driver.load("overflow", path)
    good, bad = base.prompt(40, seed=60), base.prompt(60, seed=61)
    broken = driver.add(bad, adapter="overflow", params=_params(2, new=3))
    sound = driver.add(good, params=_params(3, new=3))
    driver.run()
    failure = driver.outcomes[broken].failure
    assert failure is not None and failure.reason == "NON_FINITE_OUTPUT"
    assert driver.outcomes[broken].outputs == []
    assert _check(driver.outcomes[sound], good, base) <= TOLERANCE
    driver.unload("overflow")
    driver.step()
    assert (driver.stats.running, driver.stats.waiting, driver.stats.kv_tokens_used) == (0, 0, 0)


def test_scoring_never_holds_more_logits_than_a_slice(base: Oracle, driver: Driver) -> None:
    """The memory of a step must not grow with the chunk times the vocabulary."""
    sizes: list[int] = []
    model = driver.engine.runner.model
    compute = model.logits

    def watched(hidden_BH: Tensor, rows_B: Tensor, lora: object) -> Tensor:
        sizes.append(len(rows_B))
        return compute(hidden_BH, rows_B, lora)

    model.logits = watched
    try:
        request_id = driver.add(base.prompt(200, seed=70), params=_params(4, new=2))
        driver.run()
    finally:
        del model.logits
    assert len(driver.outcomes[request_id].prompt_scores) == 199
    assert sum(sizes) == 199 + 2 and max(sizes) <= MAX_SCORED_ROWS
