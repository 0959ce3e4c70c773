"""The benchmark runs, and both of its sides compute the same thing: with float32, every token agrees."""

from __future__ import annotations

from pathlib import Path

from benchmarks import graft_side, peft_side
from benchmarks.decode_vs_peft import as_text, summarise
from benchmarks.make_model import FULL, NUM_ADAPTERS, TINY, make_all, num_parameters
from tests.conftest import RecordNumber

NUM_NEW_TOKENS = 6


def test_the_base_has_0_79_billion_parameters(record_number: RecordNumber) -> None:
    record_number("benchmark base: parameters, in billions", num_parameters(FULL) / 1e9, at_least=0.785, at_most=0.795)


def test_both_sides_give_the_same_tokens_and_a_report(tmp_path: Path) -> None:
    make_all(tmp_path, TINY)
    prompts = [[2 + (7 * index + 3 * position) % 500 for position in range(12)] for index in range(NUM_ADAPTERS)]
    graft = graft_side.measure(tmp_path, prompts, NUM_NEW_TOKENS, repeats=1)
    model = peft_side.load(tmp_path)
    peft = [peft_side.measure(model, mode, prompts, NUM_NEW_TOKENS, max_seconds=60.0) for mode in ("merged", "active")]
    for result in peft:
        assert result.tokens == graft.with_adapters[0].tokens
    assert graft.base_only[0].tokens != graft.with_adapters[0].tokens
    report = summarise(graft, peft, NUM_NEW_TOKENS) | {"model": "tiny", "machine": {"threads": 1}}
    assert f"{report['ratio_to_peft']:.2f}x" in as_text(report)
