"""Where each token of one step stands: positions, cache slots, and which rows decode or prefill."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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

    `decode_rows_B` are the token rows that decode, ascending; `decode_rows` the same on the host;
    `decode_slots_BL` their context's cache slots, padded; `decode_lens_B` the context lengths with the new token;
    `decode_is_padded` tells whether those differ.
    """

    positions_T: Tensor
    write_slots_T: Tensor
    decode_rows_B: Tensor
    decode_rows: list[int]
    decode_slots_BL: Tensor
    decode_lens_B: Tensor
    decode_is_padded: bool
    prefills: list[PrefillSpan]
