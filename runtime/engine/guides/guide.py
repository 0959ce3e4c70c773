"""The rule of one sequence: which tokens may come next. Shape suffix: V vocabulary."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from runtime.engine.messages import RequestId
from runtime.engine.sampling_params import GuideSpec
from runtime.errors import GraftError


class Guide:
    """Owned by the engine loop. After each token, a process beside the steps finds out what may come next.

    It is ready when that is known, and due when it should be known by the end of a step that begins now: not before it
    is compiled, not with an `error`, and not while it `is_slow` to answer. After a complete text that nothing can
    extend, only the tokens that end a sequence may come.
    """

    def __init__(self, guide_id: int, request_id: RequestId, spec: GuideSpec) -> None:
        self.guide_id = guide_id
        self.request_id = request_id
        self.spec = spec
        self.error: GraftError | None = None
        self.is_slow = False
        self.asked_at: float | None = None
        self._bits: bytes | None = None

    @property
    def is_ready(self) -> bool:
        """Whether `mask_` may be called."""
        return self._bits is not None

    @property
    def is_due(self) -> bool:
        """Whether its sequence may take part in the next step."""
        return self.is_ready or (self.asked_at is not None and not self.is_slow)

    def ask(self, now: float) -> None:
        """At monotonic time `now` its sequence got a token, so that it is not known any more what may come next."""
        self._bits = None
        self.asked_at = now

    def allow(self, bits: bytes) -> None:
        """What may come next: one bit for each token id, the lowest bit of a byte first."""
        self._bits = bits
        self.asked_at = None

    def fail(self, error: GraftError) -> None:
        """It cannot be followed (any further)."""
        self.error = error
        self.asked_at = None

    def mask_(self, logits_V: Tensor) -> None:
        """Set the logits of all tokens that may not come next to -inf, in place."""
        if self._bits is None:
            raise RuntimeError(f"the guide of request {self.request_id} is not ready")
        packed = torch.frombuffer(bytearray(self._bits), dtype=torch.uint8).to(logits_V.device).int()
        logits_V += _biases_of_bytes(logits_V.device).index_select(0, packed).view(-1)[: len(logits_V)]


@cache
def _biases_of_bytes(device: torch.device) -> Tensor:
    """What each value of a byte adds to eight logits [256, 8] float32: nothing where its bit is set, else -inf.

    Looking up is ten times faster than filling by a mask, which branches at each element.
    """
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.zeros(256, 8).masked_fill(bits == 0, -math.inf).to(device)
