"""What `graft train --dry-run` says: the trainable tensors, memory for each process and FLOPs, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.trainer.report.flops import CONVENTION

MASTER_BYTES = 4  # of a LoRA parameter in fp32: the master weight, its gradient, and Adam's m and v
COMPUTE_BYTES = {"bfloat16": 2, "float32": 4}
FROZEN = "router (weights and correction bias), norms, embedding, and every weight of the base"


@dataclass(frozen=True)
class TensorInfo:
    """One trainable tensor at its full size.

    `kind`: its module without the layer, and the factor ("self_attn.q_b_proj A"). `num_shards`: processes of one
    pipeline stage that share its parameters, 1 if each holds them all. `active_share`: of its parameters, how many one
    token passes through (top-k / experts for the factors of routed experts).
    """

    kind: str
    layer: int | None
    shape: tuple[int, ...]
    lora_rank: int
    pp_stage: int = 0
    num_shards: int = 1
    active_share: float = 1.0

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StageInfo:
    """What one process of a pipeline stage holds besides LoRA; activations at the peak, with and without checkpointing.

    `base_parameters`: those of the frozen base on one process.
    """

    layers: tuple[int, ...]
    base_parameters: int
    activation_bytes: int
    checkpointed_bytes: int


@dataclass(frozen=True)
class RunPlan:
    """A run as planned. `base_parameters` is the whole base; `step_flops` is over all processes."""

    tensors: Sequence[TensorInfo]
    stages: Sequence[StageInfo]
    base_parameters: int
    dtype: str
    checkpointing: bool
    num_processes: int
    tokens_per_step: int
    step_flops: float


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of one process by use. `copies`: LoRA factors in the compute dtype, 0 where that is fp32."""

    base: int
    master: int
    gradients: int
    moments: int
    copies: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.master + self.gradients + self.moments + self.copies + self.activations


def describe_run(plan: RunPlan) -> str:
    """The whole report, several lines."""
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
        "",
        f"Work: {plan.step_flops:.3e} FLOPs for each step of {plan.tokens_per_step:,} tokens "
        f"on {plan.num_processes} {'process' if plan.num_processes == 1 else 'processes'}",
        f"  ({CONVENTION})",
    ]
    return "\n".join(lines)


def process_memory(plan: RunPlan, stage: int, *, checkpointing: bool) -> ProcessMemory:
    """Bytes of one process of a stage; a tensor that does not divide evenly is counted at the larger share."""
    info = plan.stages[stage]
    own = sum(-(-tensor.num_parameters // tensor.num_shards) for tensor in plan.tensors if tensor.pp_stage == stage)
    compute = COMPUTE_BYTES[plan.dtype]
    return ProcessMemory(
        base=info.base_parameters * compute,
        master=own * MASTER_BYTES,
        gradients=own * MASTER_BYTES,
        moments=2 * own * MASTER_BYTES,
        copies=0 if compute == MASTER_BYTES else own * compute,
        activations=info.checkpointed_bytes if checkpointing else info.activation_bytes,
    )


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
