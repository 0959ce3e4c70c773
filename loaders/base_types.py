"""The plain data that callers of `loaders.base` exchange with it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """A tensor the model needs; `keep_float32` for `e_score_correction_bias`, which is never rounded."""

    shape: tuple[int, ...]
    keep_float32: bool = False


@dataclass(frozen=True)
class BaseReport:
    """What a checkpoint holds: (name, reason) of what is skipped, bytes on disk to read, shards, fp8 weights."""

    skipped: tuple[tuple[str, str], ...]
    num_bytes: int
    shards: int
    dequantised: int
