"""Exact match of the demo adapters and of the bare base on held-out rows, by greedy decoding in transformers + PEFT."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from demo_model import ADAPTERS_DIR, DEMO_DIR, MODEL_CONFIG, MODEL_DIR, load_model
from demo_tasks import TASKS, Sample
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from runtime.cli import main as graft

MOE_LAYERS = range(MODEL_CONFIG["first_k_dense_replace"], MODEL_CONFIG["num_hidden_layers"])


def read_rows(path: Path, limit: int) -> list[Sample]:
    """The held-out rows of a task."""
    return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]


@torch.no_grad()
def generate_answers(
    model: DeepseekV3ForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Sample],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers; rows of equal prompt length share a batch, so that nothing is padded."""
    prompts = [tokenizer(row.prompt).input_ids for row in rows]
    answers = [""] * len(rows)
    for length in sorted({len(prompt) for prompt in prompts}):
        chosen = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[index] for index in chosen])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
        )
        for index, row in zip(chosen, output[:, length:].tolist(), strict=True):
            ended = tokenizer.eos_token_id in row
            text = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)] if ended else row)
            answers[index] = text if ended else text + "<no end>"
    return answers


def attach_adapter(base: DeepseekV3ForCausalLM, folder: Path, model_dir: Path) -> PeftModel:
    """The base with the adapter of a folder; one that leaves experts out goes to PEFT by way of `graft export`."""
    counts = covered_experts(load_file(folder / "adapter_model.safetensors")).values()
    if set(counts) == {MODEL_CONFIG["n_routed_experts"]}:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / folder.name
        arguments = ["export", folder, "--base", model_dir, "--out", out, "--format", "peft-v5"]
        with contextlib.redirect_stdout(sys.stderr):  # stdout holds the table alone
            status = graft([str(argument) for argument in arguments])
        if status:
            sys.exit(f"{folder} cannot be exported")
        return PeftModel.from_pretrained(base, str(out)).eval()


def covered_experts(state: Mapping[str, torch.Tensor]) -> dict[int, int]:
    """How many experts each MoE layer's part of a file covers; PEFT's stacks cover all."""
    found: dict[int, set[str]] = {layer: set() for layer in MOE_LAYERS}
    for name in state:
        if match := re.search(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.", name):
            found[int(match[1])].add(match[2])
    if not any(found.values()):
        return dict.fromkeys(MOE_LAYERS, MODEL_CONFIG["n_routed_experts"])
    return {layer: len(experts) for layer, experts in found.items()}


def exact_share(rows: Sequence[Sample], answers: Sequence[str]) -> float:
    """Share of answers that equal the expected text, every character counted."""
    return sum(row.completion == answer for row, answer in zip(rows, answers, strict=True)) / len(rows)


def describe(folder: Path) -> str:
    """Layout, rank and coverage of an adapter file."""
    path = folder / "adapter_model.safetensors"
    state, config = load_file(path), json.loads((folder / "adapter_config.json").read_text())
    layout = "per expert" if any(".gate_proj.lora_A" in name for name in state) else "stacks"
    covered = "+".join(str(count) for count in covered_experts(state).values())
    attention = "yes" if any("self_attn" in name for name in state) else "no"
    return f"{layout} | {config['r']} | {covered} | {attention} | {path.stat().st_size:,}"


def check_task(task: str, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> str:
    """One row of the table."""
    dtype = getattr(torch, args.dtype)
    rows = read_rows(args.tasks_dir / f"{task}.jsonl", args.rows)
    base = load_model(args.model, dtype)
    without = generate_answers(base, tokenizer, rows, args.max_new_tokens)
    adapted = attach_adapter(base, args.adapters / task, args.model)
    answers = generate_answers(adapted, tokenizer, rows, args.max_new_tokens)
    if args.show:
        wrong = [index for index, row in enumerate(rows) if row.completion != answers[index]][: args.show]
        for index in wrong:
            print(f"  {rows[index].prompt!r}: {answers[index]!r} instead of {rows[index].answer!r}")
        print(f"  base on {rows[0].prompt!r}: {without[0]!r}")
    shares = f"{exact_share(rows, without):.1%} | {exact_share(rows, answers):.1%}"
    return f"| {task} | {len(rows)} | {shares} | {describe(args.adapters / task)} |"


def main() -> None:
    """Print the exact-match table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help="names of tasks; all when none is given")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS_DIR)
    parser.add_argument("--tasks-dir", type=Path, default=DEMO_DIR / "tasks")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers of each task")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    start = time.monotonic()
    print("| task | rows | base | adapter | layout | rank | experts a layer | attention | bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for task in args.tasks or TASKS:
        print(check_task(task, args, tokenizer), flush=True)
    print(f"{time.monotonic() - start:.0f} s, {args.threads} thread(s), {args.dtype}")


if __name__ == "__main__":
    main()
