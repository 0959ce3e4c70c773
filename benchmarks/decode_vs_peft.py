"""Eight requests with eight adapters: Graft's throughput against transformers + PEFT and against Graft's own base.

    python -m benchmarks.decode_vs_peft [--tiny] [--threads N] [--models DIR] [--results DIR]

Both sides run in this process, one after the other, on the same files: 64 tokens in, 64 out, greedy. Timed is the
whole request, prompt included; loading the base and the adapters is not. PEFT's better mode counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import graft_side, machine, peft_side
from benchmarks.graft_side import GraftResult
from benchmarks.make_model import DEFAULT_OUT, FULL, NUM_ADAPTERS, TINY, make_all
from benchmarks.peft_side import PeftResult

NUM_PROMPT_TOKENS = 64
NUM_NEW_TOKENS = 64
ASKED_VS_PEFT = 6.0
ASKED_VS_BASE = 0.8


def main() -> None:
    """Command line: see the module's text."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    config = TINY if arguments.tiny else FULL
    out = arguments.models / ("tiny" if arguments.tiny else "full")
    make_all(out, config)
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_ADAPTERS, NUM_PROMPT_TOKENS)
    prompts = torch.randint(2, config["vocab_size"], shape, generator=generator).tolist()
    graft = graft_side.measure(out, prompts, NUM_NEW_TOKENS, arguments.repeats)
    for name, runs in (("with adapters", graft.with_adapters), ("base only", graft.base_only)):
        rates = ", ".join(f"{_rate(run.seconds, NUM_NEW_TOKENS):.1f}" for run in runs)
        print(f"Graft {name}: {rates} tokens/s", flush=True)
    model = peft_side.load(out)
    peft = []
    for mode in ("merged", "active"):
        peft.append(peft_side.measure(model, mode, prompts, NUM_NEW_TOKENS, arguments.max_seconds))
        print(f"PEFT {mode}: {_rate(peft[-1].seconds_for(NUM_ADAPTERS), NUM_NEW_TOKENS):.2f} tokens/s", flush=True)
    about = {"model": "tiny" if arguments.tiny else "0.79 B, bfloat16", "machine": machine.describe()}
    report = summarise(graft, peft, NUM_NEW_TOKENS) | about
    text = as_text(report)
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = "decode_vs_peft_tiny" if arguments.tiny else "decode_vs_peft"
    raw = report | {"graft": asdict(graft), "peft": [asdict(result) for result in peft]}
    (arguments.results / f"{stem}.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    (arguments.results / f"{stem}.txt").write_text(text + "\n", encoding="utf-8")


def summarise(graft: GraftResult, peft: list[PeftResult], num_new_tokens: int) -> dict[str, Any]:
    """Tokens per second of each way (median run of Graft's), and the two ratios that are asked for."""
    adapters, base = (
        _rate(statistics.median(run.seconds for run in runs), num_new_tokens)
        for runs in (graft.with_adapters, graft.base_only)
    )
    rates = {result.mode: _rate(result.seconds_for(NUM_ADAPTERS), num_new_tokens) for result in peft}
    return {
        "tokens_per_second": {
            "graft, 8 adapters": adapters,
            "graft, base only": base,
            **{f"transformers + PEFT, {mode}": rate for mode, rate in rates.items()},
        },
        "ratio_to_peft": adapters / max(rates.values()),
        "ratio_to_base_only": adapters / base,
        "notes": [_peft_note(result) for result in peft] + [_agreement(graft, peft)],
    }


def as_text(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    lines = [
        f"{NUM_ADAPTERS} requests, each with its own rank-16 adapter on all routed experts",
        f"{NUM_PROMPT_TOKENS} tokens in, {NUM_NEW_TOKENS} out, greedy; model: {report['model']}",
        "",
    ]
    lines += [f"  {name:<32} {rate:>9.2f} tokens/s" for name, rate in report["tokens_per_second"].items()]
    lines += [
        "",
        f"  to the better of PEFT's:   {report['ratio_to_peft']:.2f}x   asked >= {ASKED_VS_PEFT}x",
        f"  to Graft's own base-only:  {report['ratio_to_base_only']:.2f}    asked >= {ASKED_VS_BASE}",
        "",
    ]
    lines += [f"  {note}" for note in report["notes"]]
    return "\n".join([*lines, "", *(f"  {name}: {value}" for name, value in report["machine"].items())])


def _rate(seconds: float, num_new_tokens: int) -> float:
    return NUM_ADAPTERS * num_new_tokens / seconds


def _peft_note(result: PeftResult) -> str:
    probes = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.probe_seconds.items())
    num_run = len(result.request_seconds)
    whole = (
        "all requests were run"
        if num_run == NUM_ADAPTERS
        else (f"EXTRAPOLATED: {num_run} of {NUM_ADAPTERS} requests were run whole, the rest taken as their mean")
    )
    return f"PEFT {result.mode}: {whole}; experts by {result.implementation}, the fastest of ({probes})"


def _agreement(graft: GraftResult, peft: list[PeftResult]) -> str:
    """How far the two sides say the same: a guard against timing two different computations."""
    parts = []
    for result in peft:
        pairs = list(zip(graft.with_adapters[0].tokens, result.tokens, strict=False))
        firsts = sum(ours[0] == theirs[0] for ours, theirs in pairs)
        same = sum(a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
        total = sum(len(ours) for ours, _ in pairs)
        parts.append(f"{result.mode}: {firsts}/{len(pairs)} first tokens, {same}/{total} of all")
    return "Graft's tokens that equal PEFT's (in 16 bits, paths part at near ties): " + "; ".join(parts)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--tiny", action="store_true", help="a small float32 model, to try the script")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of Graft; the median counts")
    parser.add_argument("--max-seconds", type=float, default=600.0, help="of each PEFT mode, before it is extrapolated")
    return parser.parse_args()


if __name__ == "__main__":
    main()
