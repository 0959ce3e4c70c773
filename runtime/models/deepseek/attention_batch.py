"""Where each token of one step stands: positions, cache slots, and which rows decode or prefill."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from runtime.ops.latent_cache import DecodeContext


@dataclass(frozen=True)
class PrefillSpan:
    """The rows [start, stop) of the step hold one sequence's next chunk; its context grows to `slots_L`.

    `slots_L` are the cache slots of all tokens up to the end of the chunk; `sequence` is its index in the batch.
    """

    sequence: int
    start: int
    stop: int
    slots_L: Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """One step's attention layout. All index tensors are int64 on the device.

    `decode_rows_B` are the token rows that decode, ascending; `decode_rows` the same on the host; `decode_context`
    says where their contexts lie.
    """

    positions_T: Tensor
    write_slots_T: Tensor
    decode_rows_B: Tensor
    decode_rows: list[int]
    decode_context: DecodeContext
    prefills: list[PrefillSpan]
