"""Runs one batch on the device: index tensors, the step's LoRA plan, the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.adapters.device_pages import DevicePages
from runtime.adapters.lora_plan import BASE_SLOT, LoraPlan
from runtime.engine.batch import Batch, Chunk
from runtime.engine.kv_cache import make_caches
from runtime.engine.messages import RequestId, TokenScore
from runtime.engine.token_scores import score_tokens
from runtime.models.deepseek.attention_batch import AttentionBatch, PrefillSpan
from runtime.models.deepseek.model import DeepseekModel
from runtime.ops.latent_cache import DecodeContext

# Logits of more prompt tokens than this are never in memory at once.
MAX_SCORED_ROWS = 64


@dataclass(frozen=True)
class StepResult:
    """Logits [sampling chunks, vocabulary] float32 in the batch's order, and the prompt scores that were asked for."""

    logits: Tensor
    prompt_scores: dict[RequestId, list[TokenScore]]


class Runner:
    """Owns the cache memory of all layers. `observe_logits` sees each step's request ids and logits (tests)."""

    def __init__(self, model: DeepseekModel, pages: DevicePages, num_blocks: int, block_tokens: int) -> None:
        self.model = model
        self._pages = pages
        self._block_tokens = block_tokens
        self._device = model.placement.device
        self.caches = make_caches(model.config, model.placement, num_blocks, block_tokens)
        self.observe_logits: Callable[[list[RequestId], Tensor], None] | None = None

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """Compute a batch: the logits after its sampling chunks, and the scores of its prompt targets."""
        last_rows = [stop - 1 for chunk, _, stop in _spans(batch) if chunk.samples]
        hidden_TH, lora = self._hidden(batch)
        logits = self._logits(hidden_TH, last_rows, lora)
        if self.observe_logits is not None:
            self.observe_logits([chunk.request_id for chunk in batch.chunks if chunk.samples], logits)
        return StepResult(logits, self._prompt_scores(batch, hidden_TH, lora))

    @torch.inference_mode()
    def logits_of_rows(self, batch: Batch, rows: list[int]) -> Tensor:
        """Compute a batch; returns logits [rows, vocabulary] in float32 of any of its token rows, ascending."""
        hidden_TH, lora = self._hidden(batch)
        return self._logits(hidden_TH, rows, lora)

    def _hidden(self, batch: Batch) -> tuple[Tensor, LoraPlan | None]:
        lora = self._lora_plan(batch)
        token_ids_T = self._index([token for chunk in batch.chunks for token in chunk.token_ids])
        return self.model(token_ids_T, self.caches, self._attention_batch(batch), lora), lora

    def _logits(self, hidden_TH: Tensor, rows: list[int], lora: LoraPlan | None) -> Tensor:
        rows_B = self._index(rows)
        return self.model.logits(hidden_TH[rows_B], rows_B, lora)

    def _prompt_scores(
        self, batch: Batch, hidden_TH: Tensor, lora: LoraPlan | None
    ) -> dict[RequestId, list[TokenScore]]:
        """Scores of each chunk's targets, from logits of at most MAX_SCORED_ROWS tokens at a time."""
        scores: dict[RequestId, list[TokenScore]] = {}
        for chunk, start, _ in _spans(batch):
            if chunk.targets is None:
                continue
            first, ids = start + chunk.targets.first_row, chunk.targets.token_ids
            scores[chunk.request_id] = []
            for done in range(0, len(ids), MAX_SCORED_ROWS):
                part = ids[done : done + MAX_SCORED_ROWS]
                logits = self._logits(hidden_TH, list(range(first + done, first + done + len(part))), lora)
                scores[chunk.request_id] += score_tokens(logits, part, [chunk.targets.num_top_tokens] * len(part))
        return scores

    def _lora_plan(self, batch: Batch) -> LoraPlan | None:
        """None for a batch of the base alone: it takes the path of a server without adapters."""
        slots = [chunk.slot for chunk in batch.chunks]
        if all(slot == BASE_SLOT for slot in slots):
            return None
        num_tokens = [len(chunk.token_ids) for chunk in batch.chunks]
        return LoraPlan(self._pages, self.model.placement.ops, slots, num_tokens, self._device)

    def _attention_batch(self, batch: Batch) -> AttentionBatch:
        positions: list[int] = []
        write_slots: list[int] = []
        prefills: list[PrefillSpan] = []
        decodes: list[Chunk] = []
        decode_rows: list[int] = []
        for sequence, chunk in enumerate(batch.chunks):
            first_row, stop = len(positions), chunk.start + len(chunk.token_ids)
            positions.extend(range(chunk.start, stop))
            write_slots.extend(self._slot(chunk, position) for position in range(chunk.start, stop))
            if len(chunk.token_ids) == 1:
                decodes.append(chunk)
                decode_rows.append(first_row)
            else:
                slots_L = self._slots(chunk.blocks)[:stop]
                prefills.append(PrefillSpan(sequence, first_row, len(positions), slots_L))
        return AttentionBatch(
            positions_T=self._index(positions),
            write_slots_T=self._index(write_slots),
            decode_rows_B=self._index(decode_rows),
            decode_rows=decode_rows,
            decode_context=self._decode_context(decodes),
            prefills=prefills,
        )

    def _slot(self, chunk: Chunk, position: int) -> int:
        block, offset = divmod(position, self._block_tokens)
        return chunk.blocks[block] * self._block_tokens + offset

    def _slots(self, blocks: list[int]) -> Tensor:
        """The cache slots of blocks, in their order."""
        offsets = torch.arange(self._block_tokens, device=self._device)
        return (self._index(blocks)[:, None] * self._block_tokens + offsets).flatten()

    def _decode_context(self, decodes: list[Chunk]) -> DecodeContext:
        longest = max((len(chunk.blocks) for chunk in decodes), default=0)
        padded = [chunk.blocks + [0] * (longest - len(chunk.blocks)) for chunk in decodes]
        table_BN = torch.tensor(padded, dtype=torch.int32, device=self._device).view(len(decodes), longest)
        return DecodeContext(table_BN, [chunk.start + 1 for chunk in decodes], self._block_tokens)

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _spans(batch: Batch) -> Iterator[tuple[Chunk, int, int]]:
    """Each chunk with its first token row of the batch and the row after its last."""
    start = 0
    for chunk in batch.chunks:
        stop = start + len(chunk.token_ids)
        yield chunk, start, stop
        start = stop
