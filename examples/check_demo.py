"""Exact match of the demo adapters and of the bare base on held-out rows, by greedy decoding in transformers + PEFT."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from demo_formats import covered_experts, is_per_expert, join_experts
from demo_model import ADAPTERS_DIR, DEMO_DIR, MODEL_CONFIG, MODEL_DIR, load_model
from demo_recipes import RECIPES
from demo_tasks import Sample
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

NUM_EXPERTS = int(MODEL_CONFIG["n_routed_experts"])


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


def attach_adapter(base: DeepseekV3ForCausalLM, folder: Path) -> PeftModel:
    """The base with the adapter of a folder; per-expert files are joined first, since PEFT refuses absent experts."""
    state = load_file(folder / "adapter_model.safetensors")
    if not is_per_expert(state):
        return PeftModel.from_pretrained(base, str(folder)).eval()
    model = get_peft_model(base, RECIPES[folder.name].fused_config())
    joined = join_experts(state, NUM_EXPERTS)
    if set(joined) != set(get_peft_model_state_dict(model, save_embedding_layers=False)):
        raise ValueError(f"{folder.name}: the joined keys are not those that PEFT expects")
    set_peft_model_state_dict(model, joined)
    return model.eval()


def exact_share(rows: Sequence[Sample], answers: Sequence[str]) -> float:
    """Share of answers that equal the expected text, every character counted."""
    return sum(row.answer == answer for row, answer in zip(rows, answers, strict=True)) / len(rows)


def describe(folder: Path) -> str:
    """Layout, rank and coverage of an adapter file."""
    path = folder / "adapter_model.safetensors"
    state, config = load_file(path), json.loads((folder / "adapter_config.json").read_text())
    layout = "per expert" if is_per_expert(state) else "fused"
    ranks = "/".join(str(rank) for rank in [config["r"], *sorted(config["rank_pattern"].values())])
    covered = "+".join(str(count) for count in covered_experts(state, NUM_EXPERTS).values())
    attention = "yes" if any("self_attn" in name for name in state) else "no"
    return f"{layout} | {ranks} | {covered} | {attention} | {path.stat().st_size:,}"


def check_task(task: str, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> str:
    """One row of the table."""
    dtype = getattr(torch, args.dtype)
    rows = read_rows(args.tasks_dir / f"{task}.jsonl", args.rows)
    base = load_model(args.model, dtype)
    without = generate_answers(base, tokenizer, rows, args.max_new_tokens)
    adapted = attach_adapter(base, args.adapters / task)
    answers = generate_answers(adapted, tokenizer, rows, args.max_new_tokens)
    if args.show:
        wrong = [index for index, row in enumerate(rows) if row.answer != answers[index]][: args.show]
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
    print("| task | rows | base | adapter | layout | ranks | experts a layer | attention | bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for task in args.tasks or RECIPES:
        print(check_task(task, args, tokenizer), flush=True)
    print(f"{time.monotonic() - start:.0f} s, {args.threads} thread(s), {args.dtype}")


if __name__ == "__main__":
    main()
