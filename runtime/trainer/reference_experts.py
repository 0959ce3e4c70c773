"""Routed experts with LoRA in their readable form, which `expert_function` computes by hand.

Shape suffixes: T input rows, M routed rows, H hidden, I expert width, N columns of gate and up together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.trainer.expert_function import ExpertFactors
from runtime.trainer.expert_rows import ExpertRows


def reference_experts(
    x_TH: Tensor, gates_M: Tensor, w13: Tensor, w2: Tensor, factors: ExpertFactors | None, rows: ExpertRows
) -> Tensor:
    """Reference of `routed_experts`, row by row, differentiated by autograd; w13 [E, 2I, H] and w2 [E, H, I]."""
    out_TH = torch.zeros_like(x_TH)
    adapted_M = torch.arange(len(rows.token_of_M)) if rows.rows_L is None else rows.rows_L
    adapted_by = dict(zip(adapted_M.tolist(), torch.repeat_interleave(rows.counts_G).tolist(), strict=True))
    experts_M = torch.repeat_interleave(rows.counts_E)
    for row, (token, expert) in enumerate(zip(rows.token_of_M.tolist(), experts_M.tolist(), strict=True)):
        x_H = x_TH[token]
        gate_up = w13[expert] @ x_H
        index = adapted_by.get(row)
        if factors is not None and index is not None:
            gate_up = gate_up + factors.scale13 * (factors.b13[index] @ (factors.a13[index] @ x_H))
        gate, up = gate_up.chunk(2)
        inner_I = torch.nn.functional.silu(gate) * up
        y_H = w2[expert] @ inner_I
        if factors is not None and index is not None:
            y_H = y_H + factors.scale2 * (factors.b2[index] @ (factors.a2[index] @ inner_I))
        out_TH = out_TH.index_add(0, torch.tensor([token]), (gates_M[row] * y_H)[None])
    return out_TH
