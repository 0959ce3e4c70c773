"""Every bound that the API puts on a request, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; the TGIS contract's numbers where it has them."""

    max_model_len: int
    max_new_tokens: int = 1024
    default_max_new_tokens: int = 20
    max_stop_sequences: int = 6
    max_stop_sequence_bytes: int = 240
    max_top_n_tokens: int = 10
    min_temperature: float = 0.05
    max_temperature: float = 100.0
    max_repetition_penalty: float = 2.0
    min_decay_factor: float = 1.0
    max_decay_factor: float = 10.0
    max_guide_bytes: int = 16 * 1024
    max_choices: int = 256
    max_batch_requests: int = 256
