"""Logits of every position of a text, through the same batches and cache as serving: for evaluation and tests."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.adapters.lora_plan import BASE_SLOT
from runtime.engine.batch import Batch, Chunk
from runtime.engine.engine import Engine
from runtime.engine.messages import RequestId


def score(engine: Engine, token_ids: list[int], adapter: str | None = None) -> Tensor:
    """Logits [T, vocabulary] float32 after each token, in chunks of `max_batch_tokens`; the engine must be idle.

    Raises NotFound for an unknown adapter.
    """
    record = engine.adapters.acquire(adapter) if adapter is not None else None
    pool, limit = engine.scheduler.blocks, engine.config.max_batch_tokens
    blocks = pool.allocate(pool.blocks_for(len(token_ids)))
    parts = []
    try:
        while record is not None and not record.is_resident:
            engine.adapters.advance(whole=True)
        for start in range(0, len(token_ids), limit):
            ids = token_ids[start : start + limit]
            slot = record.slot if record is not None else BASE_SLOT
            chunk = Chunk(RequestId(0), ids, start, blocks, slot, samples=False)
            parts.append(engine.runner.logits_of_rows(Batch([chunk]), list(range(len(ids)))))
    finally:
        pool.free(blocks)
        if record is not None:
            engine.adapters.release(record)
    return torch.cat(parts)
