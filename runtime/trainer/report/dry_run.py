"""What `graft train --dry-run` prints: the data and the plan of a run, in words and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.config import TrainConfig
from runtime.trainer.model import check_base_fits
from runtime.trainer.plan import RunPlan, TensorInfo, plan_run, process_memory
from runtime.trainer.report.flops import CONVENTION
from runtime.trainer.run_data import read_run_data
from runtime.trainer.step_data import mean_row

NOT_COUNTED = (
    "of tensors alone: the process with its libraries and what the allocator loses come on top, about a fifth where it "
    "was measured (a CPU, docs/training.md)"
)
FROZEN = "router (weights and correction bias), norms, embedding, and every weight of the base"


def describe(config: TrainConfig) -> str:
    """The whole report; reads the data and the base's config, but no weight."""
    base = DeepseekConfig.from_dir(config.model)
    check_base_fits(config, base)
    lines: list[str] = []
    data = read_run_data(config, base, lines.append)
    tokens, targets = mean_row(config, data.documents)
    lines += ["", describe_run(plan_run(base, config, tokens, targets))]
    if config.selection is not None:
        lines += ["", "selection leaves experts out before training; the numbers above count all of them"]
    return "\n".join(lines)


def describe_run(plan: RunPlan) -> str:
    """The plan, several lines."""
    trainable = sum(tensor.num_parameters for tensor in plan.tensors)
    share = trainable / plan.base_parameters
    checkpointing = "with" if plan.checkpointing else "without"
    lines = [
        "Trainable tensors",
        *_table(("module", "layers", "shape", "rank", "tensors", "parameters"), _tensor_rows(plan.tensors)),
        f"  {trainable:,} trainable parameters, {share:.3%} of the base's {plan.base_parameters:,}",
        f"  frozen: {FROZEN}",
        "",
        f"Memory of each process in GiB, estimated, {checkpointing} activation checkpointing",
        *_memory_table(plan),
        f"  {NOT_COUNTED}",
        "",
        f"Work: {plan.step_flops:.3e} FLOPs for each step of {plan.tokens_per_step:,} tokens "
        f"on {plan.num_processes} {'process' if plan.num_processes == 1 else 'processes'}",
        f"  ({CONVENTION})",
    ]
    return "\n".join(lines)


def format_layers(layers: Sequence[int]) -> str:
    """Ranges of layer numbers: "0-2, 5"."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _tensor_rows(tensors: Sequence[TensorInfo]) -> list[tuple[str, ...]]:
    """One row for all tensors that differ in nothing but their layer."""
    groups: dict[tuple[str, tuple[int, ...], int], list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.kind, tensor.shape, tensor.lora_rank), []).append(tensor)
    return [
        (
            kind,
            format_layers([tensor.layer for tensor in group if tensor.layer is not None]) or "-",
            " x ".join(map(str, shape)),
            str(rank),
            str(len(group)),
            f"{len(group) * math.prod(shape):,}",
        )
        for (kind, shape, rank), group in groups.items()
    ]


def _memory_table(plan: RunPlan) -> list[str]:
    other = "without" if plan.checkpointing else "with"
    uses = ("base", "LoRA fp32", "gradients", "Adam m, v", "compute copies", "activations", "total")
    rows, digits = [], _gib_digits(plan)
    for stage, info in enumerate(plan.stages):
        memory = process_memory(plan, stage, checkpointing=plan.checkpointing)
        parts = (memory.base, memory.master, memory.gradients, memory.moments, memory.copies, memory.activations)
        otherwise = process_memory(plan, stage, checkpointing=not plan.checkpointing).total
        numbers = [f"{num_bytes / 2**30:.{digits}f}" for num_bytes in (*parts, memory.total, otherwise)]
        rows.append((str(stage), format_layers(info.layers), *numbers))
    return _table(("stage", "layers", *uses, f"total {other}"), rows)


def _gib_digits(plan: RunPlan) -> int:
    """Digits after the point: models of any size, and small factors beside them, can be read."""
    totals = [process_memory(plan, stage, checkpointing=False).total for stage in range(len(plan.stages))]
    return 3 if max(totals, default=0) < 32 * 2**30 else 1


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligned lines, text to the left and numbers to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    left = [not column[-1].replace(",", "").replace(".", "").isdigit() for column in columns]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in (header, *rows)
    ]
