"""Train the demo adapters with PEFT on the demo base, and write them as PEFT files."""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import demo_tasks
import torch
from demo_batches import Batch, encode, forced_exact, stream_batches, weighted_loss
from demo_formats import PREFIX, per_expert_a, per_expert_b, split_experts
from demo_model import ADAPTERS_DIR, BASE_NAME, MODEL_CONFIG, MODEL_DIR, load_model, routers
from demo_recipes import RECIPES, Recipe
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoTokenizer, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

NUM_EXPERTS = int(MODEL_CONFIG["n_routed_experts"])


def moe_layers() -> list[int]:
    """Indices of the layers that have routed experts."""
    return list(range(MODEL_CONFIG["first_k_dense_replace"], MODEL_CONFIG["num_hidden_layers"]))


@torch.no_grad()
def busiest_experts(
    model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str, num_experts: int
) -> dict[int, list[int]]:
    """Per MoE layer, the experts that receive most tokens on a sample of the task."""
    loads = [torch.zeros(NUM_EXPERTS) for _ in routers(model)]

    def counter(load: torch.Tensor) -> Callable[[torch.nn.Module, object, tuple[torch.Tensor, ...]], None]:
        def count(_router: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
            load.add_(torch.bincount(output[2].flatten(), minlength=NUM_EXPERTS))

        return count

    hooks = [router.register_forward_hook(counter(load)) for router, load in zip(routers(model), loads, strict=True)]
    for row in encode(tokenizer, list(islice(demo_tasks.stream(task, 7, held_out=False), 400))):
        model(input_ids=torch.tensor([row.ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    shares = [f"{load.topk(num_experts).values.sum() / load.sum():.0%}" for load in loads]
    print(
        f"  {task}: {num_experts} of {NUM_EXPERTS} experts a layer receive {', '.join(shares)} of the tokens",
        flush=True,
    )
    return {
        layer: sorted(load.topk(num_experts).indices.tolist()) for layer, load in zip(moe_layers(), loads, strict=True)
    }


def freeze_other_experts(model: PeftModel, kept: dict[int, list[int]]) -> None:
    """Zero the B gradients of the experts that are not kept: their B stays zero, so they add nothing."""
    for name, parameter in model.named_parameters():
        if ".mlp.experts." not in name or "lora_B" not in name:
            continue
        layer = int(name.split(".layers.")[1].split(".")[0])
        mask = torch.zeros(NUM_EXPERTS)
        mask[kept[layer]] = 1.0
        columns = mask.repeat(parameter.shape[1] // NUM_EXPERTS)  # experts are innermost in a fused B
        parameter.register_hook(lambda grad, columns=columns: grad * columns)


def train_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, task: str, recipe: Recipe, seed: int, batch_tokens: int
) -> None:
    """Fit the LoRA factors to the task's answers; prompts carry no loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.peak_lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    samples = demo_tasks.stream(task, seed, held_out=False)
    batches = stream_batches(samples, tokenizer, batch_tokens, 0.0, random.Random(seed))
    for step, batch in enumerate(islice(batches, recipe.num_steps)):
        warm = min(1.0, (step + 1) / 30)
        rate = recipe.peak_lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = adapter_step(model, batch, optimizer, parameters)
        if (step + 1) % 50 == 0:
            print(f"  {task} step {step + 1} loss {loss:.4f}", flush=True)


def adapter_step(
    model: PeftModel, batch: Batch, optimizer: torch.optim.AdamW, parameters: list[torch.nn.Parameter]
) -> float:
    """One update; returns the loss."""
    loss = weighted_loss(model(input_ids=batch.ids, use_cache=False).logits, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss.item()


def check_split(fused: dict[str, torch.Tensor], split: dict[str, torch.Tensor], kept: dict[int, list[int]]) -> None:
    """Compare every expert's product of factors in both layouts; raises RuntimeError unless they are equal."""
    for layer in kept:
        for part, names in (("experts.base_layer.", ("gate", "up")), ("experts.", ("down",))):
            a = per_expert_a(fused[f"{PREFIX}{layer}.mlp.{part}lora_A.weight"], NUM_EXPERTS).float()
            b = per_expert_b(fused[f"{PREFIX}{layer}.mlp.{part}lora_B.weight"], NUM_EXPERTS).float()
            for expert in range(NUM_EXPERTS):
                keys = [f"{PREFIX}{layer}.mlp.experts.{expert}.{name}_proj.lora_" for name in names]
                if expert not in kept[layer]:
                    same = not b[expert].any() and not any(f"{key}A.weight" in split for key in keys)
                else:
                    products = [split[f"{key}B.weight"].float() @ split[f"{key}A.weight"].float() for key in keys]
                    same = torch.allclose(torch.cat(products), b[expert] @ a[expert], rtol=0, atol=1e-6)
                if not same:
                    raise RuntimeError(f"layer {layer} expert {expert}: the split of {part} is not exact")


def save_adapter(model: PeftModel, recipe: Recipe, kept: dict[int, list[int]], folder: Path) -> None:
    """Write bf16 factors and PEFT's own configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    if recipe.per_expert:
        fused, state = state, split_experts(state, NUM_EXPERTS, kept)
        check_split(fused, state, kept)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    save_config(recipe.file_config(), folder)


def save_config(config: LoraConfig, folder: Path) -> None:
    """Write adapter_config.json; sorted, because PEFT holds module names in sets, whose order varies."""
    config.base_model_name_or_path = BASE_NAME
    config.inference_mode = True
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    for name in ("target_modules", "target_parameters"):
        values[name] = sorted(values[name]) if values.get(name) else values.get(name)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def make_adapter(task: str, args: argparse.Namespace) -> None:
    """Train and save one adapter."""
    recipe = RECIPES[task] if args.steps is None else replace(RECIPES[task], num_steps=args.steps)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = load_model(args.model)
    kept = {layer: list(range(NUM_EXPERTS)) for layer in moe_layers()}
    if recipe.experts_per_layer:
        kept = busiest_experts(base, tokenizer, task, recipe.experts_per_layer)
    torch.manual_seed(args.seed)
    model = get_peft_model(base, recipe.fused_config())
    freeze_other_experts(model, kept)
    start = time.monotonic()
    train_adapter(model, tokenizer, task, recipe, args.seed, args.batch_tokens)
    seconds = time.monotonic() - start
    save_adapter(model, recipe, kept, args.out / task)
    rows = encode(tokenizer, list(islice(demo_tasks.stream(task, 3, held_out=False), 200)))
    score = forced_exact(model.eval(), rows, tokenizer.eos_token_id)
    print(f"{task}: {recipe.num_steps} steps in {seconds:.0f} s, {score:.1%} of 200 training-side rows", flush=True)


def main() -> None:
    """Parse the arguments and train the named adapters, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help="names of tasks; all when none is given")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR)
    parser.add_argument("--steps", type=int, help="instead of the recipe's number of steps")
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    unknown = set(args.tasks) - set(RECIPES)
    if unknown:
        parser.error(f"unknown tasks {sorted(unknown)}; choose from {sorted(RECIPES)}")
    torch.set_num_threads(args.threads)
    for task in args.tasks or RECIPES:
        make_adapter(task, args)


if __name__ == "__main__":
    main()
