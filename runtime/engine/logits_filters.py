"""What a request's parameters do to logits, each in the arithmetic of the logits processor of transformers.

The masks are therefore theirs to the last bit. The order is that of `GenerationMixin._get_logits_processor`: repetition
penalty, early end, length penalty, and for draws temperature, top-k, top-p, typical-p. Where their numbers would
overflow to infinities that no longer have an order, the limit is taken instead, so that no parameter ends in NaN.

Shape suffixes: V vocabulary, B rows, N tokens that end a sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from runtime.engine.sampling_params import SamplingParams

_LARGEST = torch.finfo(torch.float32).max
_SMALLEST = torch.finfo(torch.float32).tiny


def penalize_repetition(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens (bool [V]) by `penalty` and multiply negative ones by it.

    Keskar et al. 2019, arXiv:1909.05858.
    """
    factor = max(penalty, _SMALLEST)
    penalized_V = torch.where(logits_V < 0, logits_V * factor, logits_V / factor).clamp(max=_LARGEST)
    return torch.where(seen_V, penalized_V, logits_V)


def penalize_length(logits_V: Tensor, end_ids_N: Tensor, factor: float, num_beyond: int) -> Tensor:
    """Raise the tokens that end by their size times `factor ** num_beyond - 1`; masked ones stay masked."""
    if num_beyond <= 0:
        return logits_V
    ends_N = logits_V[end_ids_N]
    raised_N = (ends_N + ends_N.abs() * (_power(factor, num_beyond) - 1)).clamp(max=_LARGEST)
    return logits_V.index_copy(0, end_ids_N, torch.where(ends_N.isfinite(), raised_N, ends_N))


def forbid_end_(logits_BV: Tensor, rows_B: Tensor, end_ids_N: Tensor) -> None:
    """Mask the tokens that end, in the given rows; a row that has no other token left keeps them."""
    ends = (rows_B[:, None], end_ids_N)
    before_BN = logits_BV[ends]
    logits_BV[ends] = -math.inf
    is_open_B = logits_BV.amax(-1)[rows_B] > -math.inf
    logits_BV[ends] = before_BN.masked_fill(is_open_B[:, None], -math.inf)


def filter_for_draw(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Logits after temperature, top-k, top-p and typical-p; what must not be drawn is -inf."""
    scaled_V = _divide(logits_V, params.temperature)
    if params.top_k:
        scaled_V = _keep_top_k(scaled_V, params.top_k)
    if params.top_p < 1:
        scaled_V = _keep_top_p(scaled_V, params.top_p)
    if params.typical_p < 1:
        scaled_V = _keep_typical(scaled_V, params.typical_p)
    return scaled_V


def _power(factor: float, exponent: int) -> float:
    """`factor ** exponent`, at most the largest float32."""
    if exponent * math.log(factor) >= math.log(_LARGEST):
        return _LARGEST
    return math.pow(factor, exponent)


def _divide(logits_V: Tensor, temperature: float) -> Tensor:
    """Logits / temperature. If that overflows, only the largest are left: the limit for temperature to 0."""
    scaled_V = logits_V / temperature
    largest = logits_V.amax()
    if (largest / temperature).isfinite():
        return scaled_V
    return torch.where(logits_V == largest, 0.0, -math.inf)


def _keep_top_k(logits_V: Tensor, top_k: int) -> Tensor:
    smallest_kept = logits_V.topk(min(top_k, len(logits_V))).values[-1]
    return logits_V.masked_fill(logits_V < smallest_kept, -math.inf)


def _keep_top_p(logits_V: Tensor, top_p: float) -> Tensor:
    """Holtzman et al. 2020, arXiv:1904.09751."""
    ascending_V, order_V = logits_V.sort()
    dropped_V = ascending_V.softmax(-1).cumsum(-1) <= 1 - top_p
    dropped_V[-1] = False
    return logits_V.masked_fill(dropped_V.scatter(0, order_V, dropped_V), -math.inf)


def _keep_typical(logits_V: Tensor, mass: float) -> Tensor:
    """The tokens whose surprise is closest to the expected one (Meister et al. 2022, arXiv:2202.00666)."""
    logprobs_V = logits_V.log_softmax(-1)
    entropy = -(logprobs_V * logprobs_V.exp()).nansum(-1)
    distance_V, order_V = (-logprobs_V - entropy).abs().sort()
    below_mass_V = logits_V[order_V].softmax(-1).cumsum(-1) < mass
    last = below_mass_V.sum().clamp(max=len(logits_V) - 1)
    dropped_V = distance_V > distance_V[last]
    dropped_V[0] = False
    return logits_V.masked_fill(dropped_V.scatter(0, order_V, dropped_V), -math.inf)
