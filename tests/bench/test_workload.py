"""What is sent is decided by the plan and its seed: lengths, adapters, texts, arrivals, held to their distributions."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest

from runtime.bench.lengths import LogNormal, Uniform, parse_lengths
from runtime.bench.plan import BenchPlan
from runtime.bench.workload import WARMUP, RequestSpec, Workload
from runtime.pb.fmaas import generation_pb2 as pb

INFO = pb.ModelInfoResponse(max_sequence_length=2048, max_new_tokens=512)


def requests(count: int, purpose: str = "measured", **plan: object) -> list[RequestSpec]:
    return list(islice(Workload(BenchPlan("", **plan), INFO).requests(purpose), count))


def arrivals(count: int, **plan: object) -> np.ndarray:
    return np.array(list(islice(Workload(BenchPlan("", **plan), INFO).arrivals(), count)))


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("7", Uniform(7, 7)), ("3:9", Uniform(3, 9)), ("lognormal:100:0.5", LogNormal(100, 0.5))],
)
def test_lengths_are_read_and_written_in_the_same_form(text: str, lengths: object) -> None:
    assert parse_lengths(text, "--x") == lengths
    assert str(lengths) == text


@pytest.mark.parametrize("text", ["", "0", "5:4", "-1", "a", "1:2:3", "lognormal", "lognormal:0:1", "lognormal:9:nan"])
def test_other_lengths_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match=r"--x = .* is out of range: N, LOW:HIGH"):
        parse_lengths(text, "--x")


def test_uniform_lengths_are_equally_frequent() -> None:
    rng, draws = Random(1), 6000
    counts = np.bincount([Uniform(3, 8).sample(rng) for _ in range(draws)], minlength=9)
    assert counts[:3].sum() == 0
    chi_square = float((((counts[3:] - draws / 6) ** 2) / (draws / 6)).sum())
    assert chi_square < 20.5  # 5 degrees of freedom: 1 in 1000


def test_lognormal_lengths_have_the_median_and_the_spread_that_were_asked_for() -> None:
    rng, draws = Random(2), 6000
    logs = np.log([LogNormal(400, 0.6).sample(rng) for _ in range(draws)])
    assert abs(logs.mean() - math.log(400)) < 4 * 0.6 / math.sqrt(draws)
    assert abs(logs.std() - 0.6) < 4 * 0.6 / math.sqrt(2 * draws)


def test_a_seed_gives_the_same_requests_and_another_seed_others() -> None:
    plan = {"adapters": (("a", 1.0), ("", 1.0)), "temperature": 0.5, "prompt_tokens": Uniform(5, 50)}
    first, again, other = (requests(20, seed=seed, **plan) for seed in (1, 1, 2))
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert len({spec.message.request.text for spec in first}) == 20
    assert len({spec.message.params.sampling.seed for spec in first}) == 20


def test_adapters_come_in_the_shares_of_their_weights() -> None:
    weights = {"a": 5.0, "b": 2.0, "": 1.0}
    draws = 4000
    specs = requests(draws, adapters=tuple(weights.items()), prompt_tokens=Uniform(1, 1))
    chi_square = 0.0
    for name, weight in weights.items():
        expected = draws * weight / 8
        chi_square += (sum(spec.adapter == name for spec in specs) - expected) ** 2 / expected
    assert chi_square < 13.8  # 2 degrees of freedom: 1 in 1000
    assert all(spec.message.adapter_id == spec.adapter for spec in specs)
    assert all(spec.message.HasField("adapter_id") == bool(spec.adapter) for spec in specs)


def test_the_warm_up_leaves_no_adapter_out_and_has_other_prompts() -> None:
    adapters = (("a", 1.0), ("b", 1e-9), ("", 1e-9))
    warmup = requests(3, WARMUP, adapters=adapters)
    assert [spec.adapter for spec in warmup] == ["a", "b", ""]
    assert not {s.message.request.text for s in warmup} & {s.message.request.text for s in requests(3)}


def test_lengths_reach_the_server_as_exact_limits() -> None:
    for spec in requests(50, prompt_tokens=Uniform(5, 9), output_tokens=Uniform(2, 4)):
        params = spec.message.params
        assert 5 <= params.truncate_input_tokens <= 9
        assert 2 <= params.stopping.max_new_tokens == params.stopping.min_new_tokens <= 4
        assert len(spec.message.request.text.split()) == params.truncate_input_tokens
    (spec,) = requests(1, stop_at_eos=True)
    assert (spec.message.params.stopping.min_new_tokens, spec.message.params.stopping.max_new_tokens) == (0, 64)


def test_requests_are_greedy_or_sampled() -> None:
    (greedy,), (sampled,) = requests(1), requests(1, temperature=0.75)
    assert greedy.message.params.method == pb.GREEDY
    assert not greedy.message.params.HasField("sampling")
    assert (sampled.message.params.method, sampled.message.params.sampling.temperature) == (pb.SAMPLE, 0.75)


def test_a_tail_without_end_is_cut_to_the_limits_of_the_server() -> None:
    wide = LogNormal(500, 3)
    for spec in requests(200, prompt_tokens=wide, output_tokens=wide):
        params = spec.message.params
        assert params.stopping.max_new_tokens <= 512
        assert params.truncate_input_tokens + params.stopping.max_new_tokens <= 2048


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({"output_tokens": Uniform(1, 513)}, "--output-tokens up to 513: this server generates at most 512"),
        (
            {"prompt_tokens": Uniform(1, 2000)},
            "--prompt-tokens up to 2000 and --output-tokens up to 64: a sequence of this server has at most 2048",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_the_numbers(plan: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Workload(BenchPlan("", **plan), INFO)


def test_rows_of_a_file_are_sent_in_order_and_may_choose_their_adapter(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "one", "adapter": "x"}, {"prompt": "two"}, {"prompt": "three", "adapter": ""}]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    specs = requests(4, prompts_path=path, adapters=(("mix", 1.0),))
    assert [(spec.message.request.text, spec.adapter) for spec in specs] == [
        ("one", "x"),
        ("two", "mix"),
        ("three", ""),
        ("one", "x"),
    ]
    assert all(spec.message.params.truncate_input_tokens == 0 for spec in specs)
    assert requests(1, WARMUP, prompts_path=path)[0].message.request.text == "three"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"prompt": "a"}\n{', ":2 is not JSON"),
        ("[1]", ":1 is not an object with a text"),
        ('{"prompt": ""}', ":1 is not an object with a text"),
        ('{"prompt": "a", "adapter": 3}', ':1: "adapter" is not a text'),
        ("\n", "has no rows"),
    ],
)
def test_a_file_that_is_not_one_of_prompts_is_refused_with_its_line(
    tmp_path: Path, content: str, sentence: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        Workload(BenchPlan("", prompts_path=path), INFO)


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    """Gaps: Kolmogorov-Smirnov against the exponential. Counts of a second: as much variance as mean."""
    count, rate = 8000, 40.0
    times = arrivals(count, rate=rate, seed=3)
    gaps = np.sort(np.diff(times, prepend=0.0))
    expected = 1 - np.exp(-rate * gaps)
    ranks = np.arange(count + 1) / count
    distance = max(np.max(ranks[1:] - expected), np.max(expected - ranks[:-1]))
    assert distance * math.sqrt(count) < 1.63  # 1 in 100
    per_second = np.bincount(times.astype(int))[:-1]
    dispersion = per_second.var(ddof=1) / per_second.mean()
    assert abs(dispersion - 1) < 4 * math.sqrt(2 / (len(per_second) - 1))
    in_order = np.diff(times)
    assert abs(np.corrcoef(in_order[:-1], in_order[1:])[0, 1]) < 4 / math.sqrt(count)


def test_arrivals_depend_on_the_seed_alone() -> None:
    assert np.array_equal(arrivals(50, rate=2.0, seed=1), arrivals(50, rate=2.0, seed=1, adapters=(("a", 1.0),)))
    assert not np.array_equal(arrivals(50, rate=2.0, seed=1), arrivals(50, rate=2.0, seed=2))


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({"num_requests": 0}, "--requests = 0"),
        ({"seconds": math.nan}, "--seconds = nan"),
        ({"rate": math.inf}, "--rate = inf"),
        ({"concurrency": 0}, r"--concurrency = 0 is out of range: 1\.\."),
        ({"rate": 1.0, "concurrency": -1}, r"--concurrency = -1 is out of range: 0\.\."),
        ({"adapters": (("a", 1.0), ("a", 2.0))}, "each name once"),
        ({"adapters": (("a", 0.0),)}, "a weight > 0"),
        ({"temperature": -1.0}, "--temperature"),
        ({"num_warmup": -1}, "--warmup"),
        ({"timeout_seconds": 0.0}, "--timeout"),
        ({"num_connections": 0}, "--connections"),
    ],
)
def test_a_plan_out_of_range_is_refused_by_the_option(plan: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BenchPlan("", **plan).validate()
