"""Long contexts on the demo model: memory bounded by the chunk, and the full length of 163,840 tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.config import EngineConfig
from runtime.demo import MODEL_DIR
from runtime.engine.batch import Batch, Chunk
from runtime.engine.engine import Engine
from runtime.engine.messages import AddRequest, RequestId, StepOutputs
from runtime.engine.sampling_params import SamplingParams
from tests.conftest import RecordNumber

CHUNK_TOKENS = 512
PROMPT_TOKENS = 20_000
# Scores of one chunk over the whole context, which blocks avoid: heads x queries x keys in float32.
UNBOUNDED_BYTES = 6 * CHUNK_TOKENS * PROMPT_TOKENS * 4


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns, apart from memory that is there for good."""

    def __init__(self, permanent: Iterable[Tensor]) -> None:
        super().__init__()
        self.num_bytes = 0
        # A packed weight is opaque: it has no storage to name, and no operation returns it.
        self._permanent = {tensor.untyped_storage().data_ptr() for tensor in permanent if not tensor.is_mkldnn}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._permanent:
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


def _engine(**settings: int) -> Engine:
    return Engine(EngineConfig(Path(MODEL_DIR), max_batch_tokens=CHUNK_TOKENS, **settings))  # type: ignore[arg-type]


def _prompt(length: int) -> list[int]:
    return torch.randint(2, 1000, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def _permanent(engine: Engine) -> list[Tensor]:
    return [*engine.runner.model.parameters(), *(tensor for cache in engine.runner.caches for tensor in cache.tensors)]


def _run(engine: Engine, prompt: list[int]) -> tuple[list[int], list[int]]:
    """Steps until the end: the tokens, and the largest new tensor of each step in bytes."""
    engine.submit(AddRequest(RequestId(1), prompt, SamplingParams(max_new_tokens=2, min_new_tokens=2)))
    tokens, largest = [], []
    while engine.has_work():
        with _LargestTensor(_permanent(engine)) as watch:
            events = engine.step()
        largest.append(watch.num_bytes)
        tokens += [output.token_id for event in events if isinstance(event, StepOutputs) for output in event.outputs]
    return tokens, largest


def test_a_prompt_of_20000_tokens_runs_in_chunks_with_memory_bounded_by_the_chunk(record_number: RecordNumber) -> None:
    engine = _engine(max_model_len=20_480)
    tokens, largest = _run(engine, _prompt(PROMPT_TOKENS))
    engine.close()
    num_whole_chunks, rest = divmod(PROMPT_TOKENS, CHUNK_TOKENS)
    assert len(tokens) == 2 and rest and len(largest) == num_whole_chunks + 2
    growth = max(largest[:num_whole_chunks]) / largest[num_whole_chunks // 2]
    record_number("20,000-token prompt: largest tensor, all whole chunks / the middle one", growth, at_most=1.0)
    share = max(largest) / UNBOUNDED_BYTES
    record_number("20,000-token prompt: largest tensor / scores of a chunk over all keys", share, at_most=0.1)


def test_the_whole_context_of_163840_tokens_can_be_served(record_number: RecordNumber) -> None:
    """The last positions of a full context, computed on a cache that says that all tokens before are there."""
    engine = _engine(max_model_len=163_840)
    record_number("longest sequence that is taken", engine.ready.max_model_len, at_least=163_840)
    blocks = engine.scheduler.blocks.allocate(engine.scheduler.blocks.blocks_for(163_840))
    chunk = Chunk(RequestId(1), _prompt(8), 163_840 - 8, blocks, -1, samples=True)
    logits = engine.runner.run(Batch([chunk])).logits
    engine.close()
    assert logits.shape == (1, engine.ready.vocab_size) and logits.isfinite().all()


@pytest.mark.parametrize("settings", [{"max_model_len": 163_841}, {"max_model_len": 4096, "kv_cache_tokens": 2048}])
def test_lengths_that_cannot_be_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="max_model_len"):
        _engine(**settings)
