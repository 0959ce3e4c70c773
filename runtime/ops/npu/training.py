"""What only training runs: attention with gradients, and SwiGLU's gradient; shape suffixes as in `base.py`."""

from __future__ import annotations

import torch_npu
from torch import Tensor
from torch.nn.functional import pad

from runtime.ops import reference
from runtime.ops.npu.masks import compressed_causal_mask
from runtime.ops.told import tell_once

MAX_WIDTH = 768
_LEFT_UPPER_CAUSAL = 2  # of `sparse_mode`


def attention(query_DHLX: Tensor, key_DHLX: Tensor, value_DHLV: Tensor, scale: float) -> Tensor:
    """`Ops.attention`; the operator wants one width, and zeros change no product."""
    num_value = value_DHLV.shape[3]
    width = max(query_DHLX.shape[3], num_value)
    if width > MAX_WIDTH:
        tell_once("npu_fusion_attention", f"heads of width {width}, where it takes {MAX_WIDTH}")
        return reference.attention(query_DHLX, key_DHLX, value_DHLV, scale)
    query, key, value = (_widened(x, width) for x in (query_DHLX, key_DHLX, value_DHLV))
    out_DHLX: Tensor = torch_npu.npu_fusion_attention(
        query,
        key,
        value,
        query.shape[1],
        "BNSD",
        atten_mask=compressed_causal_mask(query.device),
        scale=scale,
        sparse_mode=_LEFT_UPPER_CAUSAL,
    )[0]
    return out_DHLX[..., :num_value]


def swiglu_backward(x_T2N: Tensor, grad_TN: Tensor) -> Tensor:
    """`Ops.swiglu_backward`, by the operator that is `npu_swiglu`'s own derivative."""
    grad_T2N: Tensor = torch_npu.npu_swiglu_backward(grad_TN, x_T2N, dim=-1)
    return grad_T2N


def _widened(x: Tensor, width: int) -> Tensor:
    missing = width - x.shape[3]
    return pad(x, (0, missing)) if missing else x.contiguous()
