"""transformers + PEFT's part of train_vs_peft: rank-16 LoRA on the fused routed experts by `target_parameters`.

    python -m benchmarks.train_peft_side --model DIR --dtype D --batch B --steps N --threads T --experts WAY

PEFT keeps its factors in float32 whatever the base's dtype, its default; in bfloat16 they were no faster.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.train_side import (
    CLIP_NORM,
    LEARNING_RATE,
    LORA_RANK,
    SideResult,
    limit_process,
    parser,
    print_result,
    run,
)

EXPERTS = ("grouped_mm", "eager", "batched_mm")


def load(arguments: argparse.Namespace) -> PeftModel:
    """The base in the compute dtype, frozen, with LoRA that has no effect yet."""
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), experts_implementation=arguments.experts
    )
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    return get_peft_model(model, config).train()


def measure(arguments: argparse.Namespace) -> SideResult:
    """Load, then train on the shared rows."""
    model = load(arguments)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(ids: Tensor) -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        return float(loss.item())

    return run("peft", arguments, step, sum(parameter.numel() for parameter in parameters), arguments.experts)


def main() -> None:
    """Command line: see the module's text."""
    command = parser(__doc__)
    command.add_argument("--experts", choices=EXPERTS, default="grouped_mm")
    arguments = command.parse_args()
    limit_process(arguments)
    print_result(measure(arguments))


if __name__ == "__main__":
    main()
