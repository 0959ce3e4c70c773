"""AdamW over the adapter's factors, its learning-rate schedule, and LoRA+'s larger rate for B."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from runtime.trainer.config import OptimizerConfig
from runtime.trainer.parameters import LoraParameter, Side


def make_optimizer(parameters: Sequence[LoraParameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """A group for A and one for B, whose rate is `lora_plus_ratio` times A's (Hayou et al. 2024, arXiv:2402.12354)."""
    ratios = {Side.A: 1.0, Side.B: config.lora_plus_ratio}
    groups = []
    for side, ratio in ratios.items():
        tensors = [parameter.tensor for parameter in parameters if parameter.side is side]
        if tensors:
            groups.append({"params": tensors, "ratio": ratio})
    return torch.optim.AdamW(
        groups or [{"params": [], "ratio": 1.0}],  # a pipeline stage may have nothing to train
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of A, and of B in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step`, from 1 to `num_steps`: linear warm-up, then decay to `min_lr_ratio`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
