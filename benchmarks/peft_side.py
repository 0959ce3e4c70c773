"""transformers + PEFT's part of decode_vs_peft: the same requests, one adapter at a time, which is all it can do.

A batch of several adapters (`adapter_names=...`) is refused by PEFT for adapters on fused experts, so requests of
different adapters run one after the other: with the adapter active beside the base, or merged into it and out again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.make_model import NUM_ADAPTERS, adapter_dir, base_dir

IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
NUM_PROBE_TOKENS = {"merged": 16, "active": 4}  # merging is timed too, so a short run would hide the experts


@dataclass
class PeftResult:
    """Seconds of each request that was run whole, in order, and how the experts were computed."""

    mode: str
    implementation: str
    probe_seconds: dict[str, float]
    request_seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def seconds_for(self, num_requests: int) -> float:
        """Wall seconds for all requests; those not run are taken to last as long as the mean of those that were."""
        return sum(self.request_seconds) / len(self.request_seconds) * num_requests


def load(out: Path) -> PeftModel:
    """The base in its own dtype with all adapters, kept in that dtype too, which is faster than PEFT's float32."""
    model = AutoModelForCausalLM.from_pretrained(base_dir(out), dtype="auto").eval()
    peft_model = PeftModel.from_pretrained(
        model, adapter_dir(out, 0, "peft"), adapter_name="adapter-0", autocast_adapter_dtype=False
    )
    for index in range(1, NUM_ADAPTERS):
        peft_model.load_adapter(adapter_dir(out, index, "peft"), f"adapter-{index}", autocast_adapter_dtype=False)
    return peft_model.eval()


def measure(
    model: PeftModel, mode: str, prompts: Sequence[list[int]], num_new_tokens: int, max_seconds: float
) -> PeftResult:
    """Time requests until all are done or the next one would pass `max_seconds`; `mode` is "active" or "merged"."""
    run = {"active": _run_active, "merged": _run_merged}[mode]
    probes = {name: _probe(model, run, name, prompts[0], NUM_PROBE_TOKENS[mode]) for name in IMPLEMENTATIONS}
    fastest = min(probes, key=lambda name: probes[name])
    model.get_base_model().set_experts_implementation(fastest)
    result = PeftResult(mode, fastest, probes)
    for index, prompt in enumerate(prompts):
        begin = time.perf_counter()
        result.tokens.append(run(model, f"adapter-{index}", prompt, num_new_tokens))
        result.request_seconds.append(time.perf_counter() - begin)
        if sum(result.request_seconds) + result.request_seconds[-1] > max_seconds:
            break
    return result


Runner = Callable[[PeftModel, str, list[int], int], list[int]]


def _probe(model: PeftModel, run: Runner, implementation: str, prompt: list[int], num_new_tokens: int) -> float:
    """Seconds of a short request, the second of two."""
    model.get_base_model().set_experts_implementation(implementation)
    run(model, "adapter-0", prompt, 1)
    begin = time.perf_counter()
    run(model, "adapter-0", prompt, num_new_tokens)
    return time.perf_counter() - begin


def _run_active(model: PeftModel, adapter: str, prompt: list[int], num_new_tokens: int) -> list[int]:
    model.set_adapter(adapter)
    return _generate(model, prompt, num_new_tokens)


def _run_merged(model: PeftModel, adapter: str, prompt: list[int], num_new_tokens: int) -> list[int]:
    model.set_adapter(adapter)
    model.merge_adapter([adapter])
    try:
        return _generate(model, prompt, num_new_tokens)
    finally:
        model.unmerge_adapter()


@torch.inference_mode()
def _generate(model: PeftModel, prompt: list[int], num_new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        pad_token_id=0,
        min_new_tokens=num_new_tokens,
        max_new_tokens=num_new_tokens,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
