"""Train the demo base from nothing on the demo corpus, on one CPU thread."""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import demo_corpus
import torch
from demo_batches import Batch, Encoded, encode, forced_exact, stream_batches, weighted_loss
from demo_model import MODEL_DIR, build_model, routers, save_model
from transformers import AutoTokenizer, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

BIAS_STEP = 1e-3  # the aux-loss-free rule of the DeepSeek-V3 report: an overloaded expert's bias falls by this

RouterHook = Callable[[torch.nn.Module, object, tuple[torch.Tensor, ...]], None]


@dataclass(frozen=True)
class Plan:
    """How long and how hard to train."""

    num_steps: int
    batch_tokens: int
    peak_lr: float
    prompt_weight: float  # most prompt tokens are random draws, so their loss teaches little
    max_seconds: float  # a slower machine trains for fewer steps, and the schedule ends with them
    seed: int
    report_every: int
    save_every: int


class LoadBalancer:
    """Counts the tokens each expert receives and moves the routers' correction biases against the imbalance."""

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        self.routers = routers(model)
        self.is_token = torch.empty(0, dtype=torch.bool)
        self.loads = [torch.zeros_like(router.get_buffer("e_score_correction_bias")) for router in self.routers]
        for index, router in enumerate(self.routers):
            router.register_forward_hook(self._counter(index))

    def _counter(self, index: int) -> RouterHook:
        """A hook that counts the chosen experts of layer `index`, padding left out."""

        def count(_module: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
            if self.is_token.numel() == output[2].shape[0]:
                chosen = output[2][self.is_token].flatten()
                self.loads[index] = torch.bincount(chosen, minlength=self.loads[index].numel()).float()

        return count

    @torch.no_grad()
    def update(self) -> None:
        """bias += step * sign(mean load - load), once an optimiser step."""
        for router, load in zip(self.routers, self.loads, strict=True):
            router.get_buffer("e_score_correction_bias").add_(BIAS_STEP * torch.sign(load.mean() - load))


def learning_rate(step: int, progress: float, plan: Plan) -> float:
    """Linear warm-up over 100 steps, then a cosine down to 3 % of the peak."""
    if step < 100:
        return plan.peak_lr * (step + 1) / 100
    return plan.peak_lr * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))


def build_optimizer(model: DeepseekV3ForCausalLM, plan: Plan) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.peak_lr, betas=(0.9, 0.97), eps=1e-9, fused=True)


def validation_rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, list[Encoded]]:
    """64 fresh documents of every kind."""
    rows: dict[str, list[Encoded]] = {}
    for index, (kind, (make, _)) in enumerate(demo_corpus.KINDS.items()):
        rng = random.Random(f"validation/{seed}/{index}")
        rows[kind] = encode(tokenizer, [make(rng) for _ in range(64)])
    return rows


def train_step(
    model: DeepseekV3ForCausalLM, batch: Batch, balancer: LoadBalancer, optimizer: torch.optim.AdamW
) -> float:
    """One forward, backward and update; returns the loss."""
    balancer.is_token = (batch.weights > 0).flatten()
    logits = model(input_ids=batch.ids, use_cache=False).logits
    loss = weighted_loss(logits, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    balancer.update()
    return loss.item()


def train(plan: Plan, out: Path) -> None:
    """Train, report and save into `out`, which holds the tokenizer already."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = build_model(plan.seed).train()
    optimizer, balancer = build_optimizer(model, plan), LoadBalancer(model)
    samples = (sample for _, sample in demo_corpus.stream(plan.seed))
    batches: Iterator[Batch] = stream_batches(
        samples, tokenizer, plan.batch_tokens, plan.prompt_weight, random.Random(plan.seed)
    )
    checks = validation_rows(tokenizer, plan.seed)
    start, num_tokens, recent = time.monotonic(), 0, 0.0
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    for step, batch in enumerate(islice(batches, plan.num_steps)):
        progress = max(step / plan.num_steps, (time.monotonic() - start) / plan.max_seconds)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, min(1.0, progress), plan)
        loss = train_step(model, batch, balancer, optimizer)
        recent = loss if step == 0 else 0.98 * recent + 0.02 * loss
        num_tokens += int((batch.weights > 0).sum())
        if (step + 1) % plan.report_every == 0 or step + 1 == plan.num_steps:
            model.eval()
            scores = {kind: forced_exact(model, rows, tokenizer.eos_token_id) for kind, rows in checks.items()}
            model.train()
            seconds = time.monotonic() - start
            shown = " ".join(f"{kind}={score:.2f}" for kind, score in scores.items())
            print(f"step {step + 1} loss {recent:.4f} tokens {num_tokens} {seconds:.0f} s {shown}", flush=True)
        if (step + 1) % plan.save_every == 0:
            save_model(model, out)
        if progress >= 1.0:
            break
    save_model(model, out)


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--prompt-weight", type=float, default=0.1)
    parser.add_argument("--report-every", type=int, default=250)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = Plan(
        args.steps,
        args.batch_tokens,
        args.lr,
        args.prompt_weight,
        args.minutes * 60,
        args.seed,
        args.report_every,
        args.save_every,
    )
    train(plan, args.out)


if __name__ == "__main__":
    main()
