"""What is known of a training run after each step and each evaluation, and the line that shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step over all processes.

    `loss`: mean over target tokens, in nats. `grad_norm`: before clipping. `tokens` leave padding out. `mfu` by the
    convention of `report.flops`, None where no peak was measured. `dropped_share`: of routed rows past the capacity.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    target_tokens: int
    seconds: float
    tokens_per_second: float
    eta_seconds: float
    mfu: float | None = None
    aux_loss: float | None = None
    dropped_share: float | None = None


@dataclass(frozen=True)
class EvalRecord:
    """One pass over the evaluation documents: mean loss per target token, and the share predicted without a mistake."""

    step: int
    loss: float
    exact_match: float | None
    num_documents: int


def format_line(record: StepRecord, total_steps: int) -> str:
    """One line, aligned with those of the other steps of a run."""
    width = len(str(total_steps))
    parts = [
        f"step {record.step:>{width}}/{total_steps}",
        f"epoch {record.epoch:6.2f}",
        f"loss {record.loss:8.4f}",
        f"lr {record.lr:.2e}",
        f"grad norm {record.grad_norm:8.3f}",
        f"{record.tokens_per_second:>9,.0f} tokens/s",
    ]
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:6.1%}")
    if record.aux_loss is not None:
        parts.append(f"balance loss {record.aux_loss:8.4f}")
    if record.dropped_share is not None:
        parts.append(f"dropped {record.dropped_share:6.2%}")
    parts.append(f"left {format_duration(record.eta_seconds):>8}")
    return "  ".join(parts)


def format_evaluation(record: EvalRecord, total_steps: int) -> str:
    """One line, its loss below that of the steps."""
    head = f"eval {record.step:>{len(str(total_steps))}}/{total_steps}"
    exact = "" if record.exact_match is None else f"  exact match {record.exact_match:.1%}"
    return f"{head}  {'':12}  loss {record.loss:8.4f}{exact}  ({record.num_documents:,} documents)"


def format_duration(seconds: float) -> str:
    """`h:mm:ss`, with days in front where there are any."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}d {clock}" if days else clock
