"""One request's tokens in the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from runtime.adapters.lora_plan import BASE_SLOT
from runtime.adapters.record import AdapterRecord
from runtime.engine.guides.guide import Guide
from runtime.engine.messages import AddRequest, RequestId
from runtime.engine.sampling_params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """`token_ids` holds the prompt and what was generated; the first `num_computed` of them are in the cache.

    `queue_seconds` is the time it waited before it ran for the first time. `next_to_score` is the first prompt token
    without a score, for requests that ask for them. `seen_V` marks the first `num_seen` tokens, for the sampler.
    """

    request_id: RequestId
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    adapter: AdapterRecord | None
    deadline: float | None
    generator: torch.Generator | None
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)
    queue_seconds: float | None = None
    paused: bool = False
    next_to_score: int = 1
    seen_V: torch.Tensor | None = None
    num_seen: int = 0
    guide: Guide | None = None

    @classmethod
    def from_request(
        cls, request: AddRequest, adapter: AdapterRecord | None, guide: Guide | None = None
    ) -> Sequence:
        """A sequence at its start; sampling draws from its own generator, so neighbours cannot change it."""
        generator = None
        if request.params.temperature > 0:
            generator = torch.Generator().manual_seed(request.params.seed)
        return cls(
            request_id=request.request_id,
            token_ids=list(request.prompt_ids),
            num_prompt_tokens=len(request.prompt_ids),
            params=request.params,
            adapter=adapter,
            deadline=request.deadline,
            generator=generator,
            guide=guide,
        )

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not in the cache; 1 means that the sequence decodes."""
        return len(self.token_ids) - self.num_computed

    @property
    def has_begun(self) -> bool:
        """Whether it has had a place in a batch, now or before it was preempted."""
        return self.queue_seconds is not None

    @property
    def slot(self) -> int:
        """The adapter's device slot, or that of the base."""
        return BASE_SLOT if self.adapter is None else self.adapter.slot

    @property
    def awaits_adapter(self) -> bool:
        """Whether its adapter is not on the device, or yields its place and the sequence has not begun."""
        adapter = self.adapter
        if adapter is None:
            return False
        return not adapter.is_resident or (adapter.is_yielding and not self.blocks)

    @property
    def awaits_parts(self) -> bool:
        """Whether its adapter is not to be had now, or its guide compiled or about to say what may come next."""
        return self.awaits_adapter or (self.guide is not None and not self.guide.is_due)

    @property
    def is_held(self) -> bool:
        """Whether it must not run now: it is paused, or awaits its adapter or its guide."""
        return self.paused or self.awaits_parts
