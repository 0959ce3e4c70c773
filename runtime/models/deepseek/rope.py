"""Rotary position embedding of the 64-wide key part, with YaRN (arXiv:2309.00071) as DeepSeek configures it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from runtime.models.deepseek.config import DeepseekConfig, YarnScaling
from runtime.ops.rotation import Rotation


def inverse_frequencies(config: DeepseekConfig) -> Tensor:
    """[D/2] float32: low frequencies divided by the YaRN factor, high ones kept, a linear ramp between."""
    width = config.qk_rope_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / (config.rope_theta**exponents)
    yarn = config.yarn
    if yarn is None:
        return plain
    low = math.floor(_dimension_of_rotations(yarn.beta_fast, width, config.rope_theta, yarn))
    high = math.ceil(_dimension_of_rotations(yarn.beta_slow, width, config.rope_theta, yarn))
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / (high - low or 0.001)
    interpolated = ramp.clamp(0, 1)
    return plain / yarn.factor * interpolated + plain * (1 - interpolated)


def rotary_scale(config: DeepseekConfig) -> float:
    """The factor on cos and sin; 1 where mscale equals mscale_all_dim, as in every released model."""
    yarn = config.yarn
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def softmax_scale(config: DeepseekConfig) -> float:
    """(nope + rope)^-0.5 times the square of mscale(factor, mscale_all_dim)."""
    scale: float = config.qk_head_dim**-0.5
    if config.yarn is not None and config.yarn.mscale_all_dim:
        mscale = _mscale(config.yarn.factor, config.yarn.mscale_all_dim)
        scale *= mscale * mscale
    return scale


def rotation_at(positions_T: Tensor, inverse_frequencies_F: Tensor, scale: float) -> Rotation:
    """The rotation of tokens at the given positions."""
    angles_TF = positions_T[:, None].float() * inverse_frequencies_F
    return Rotation(angles_TF.cos() * scale, angles_TF.sin() * scale)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _dimension_of_rotations(rotations: float, width: int, theta: float, yarn: YarnScaling) -> float:
    """The dimension whose wavelength fits `rotations` times into the original context."""
    periods = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
    return width * math.log(periods) / (2 * math.log(theta))
