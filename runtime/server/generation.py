"""One request's life in the front-end, whatever protocol it came by: prepare, run, cut at stops, clean up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from loaders.tokenizer import IncrementalDetokenizer, Tokenizer
from runtime.engine.messages import FinishReason, SequenceOutput
from runtime.engine.sampling_params import SamplingParams
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.server.calls import Call
from runtime.server.engine_client import EngineClient
from runtime.server.limits import Limits
from runtime.server.metrics import Metrics
from runtime.server.text import TextStream
from runtime.server.validation import GenerationOptions, fit_to_context

INLINE_TEXT_CHARS = 4096  # longer texts are tokenised in a thread, so that they hold up nobody


@dataclass(frozen=True)
class PreparedRequest:
    """A checked request, ready for the engine. `deadline` is Unix time, `arrived` is on the monotonic clock."""

    prompt: str
    prompt_ids: list[int]
    params: SamplingParams
    options: GenerationOptions
    adapter: str | None
    is_clipped: bool
    deadline: float | None
    arrived: float


@dataclass
class Progress:
    """What is new since the last one; `stop_reason` is set on the last."""

    text: str = ""
    outputs: list[SequenceOutput] = field(default_factory=list)
    num_generated: int = 0
    stop_reason: pb.StopReason = pb.NOT_FINISHED
    stop_sequence: str = ""


class TextGenerator:
    """Turns prepared requests into text, by way of the engine."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, limits: Limits, metrics: Metrics) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self._client = client
        self._metrics = metrics

    async def prepare(
        self, text: str, options: GenerationOptions, adapter: str | None, text_field: str
    ) -> PreparedRequest:
        """Tokenise, truncate and fit into the context; raises InvalidRequest naming `text_field`."""
        arrival, arrived = time.time(), time.monotonic()
        prompt_ids = self.truncate(await self.encode(text), options.truncate_input_tokens)
        params, is_clipped = fit_to_context(options, len(prompt_ids), self.limits, text_field)
        deadline = arrival + options.time_limit_seconds if options.time_limit_seconds else None
        return PreparedRequest(text, prompt_ids, params, options, adapter, is_clipped, deadline, arrived)

    async def encode(self, text: str) -> list[int]:
        """Token ids; long texts in a thread."""
        if len(text) <= INLINE_TEXT_CHARS:
            return self.tokenizer.encode(text)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    def truncate(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """The last `max_tokens` tokens, 0 for all; a BOS in front stays and counts."""
        return [token_ids[place] for place in self.kept_places(token_ids, max_tokens)]

    def kept_places(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """Which places of a prompt remain after `truncate`."""
        places = list(range(len(token_ids)))
        if not 0 < max_tokens < len(token_ids):
            return places
        has_bos = token_ids[0] == self.tokenizer.bos_token_id
        return [0, *places[len(places) - max_tokens + 1 :]] if has_bos else places[-max_tokens:]

    async def run(self, request: PreparedRequest, call: Call) -> AsyncGenerator[Progress, None]:
        """Progress until the end, as a part of `call`. Close it early and the engine frees everything at once."""
        text = TextStream(
            IncrementalDetokenizer(self.tokenizer),
            request.options.stop_sequences,
            request.options.include_stop_sequence,
            request.params.min_new_tokens,
        )
        num_generated = 0
        stream = self._client.add(request.prompt_ids, request.params, request.adapter, request.deadline)
        timer = self._metrics.start_request(len(request.prompt_ids), request.adapter, request.arrived)
        try:
            call.attach(stream)
            async for output in stream:
                if output.token_id >= 0:
                    num_generated += 1
                    call.num_tokens += 1
                    timer.token(output.queue_seconds)
                progress = self._advance(text, output, request.is_clipped)
                progress.num_generated = num_generated
                if progress.stop_reason != pb.NOT_FINISHED:
                    timer.success(pb.StopReason.Name(progress.stop_reason))
                yield progress
                if progress.stop_reason != pb.NOT_FINISHED:
                    return
        finally:
            timer.close()
            stream.close()

    def _advance(self, text: TextStream, output: SequenceOutput, is_clipped: bool) -> Progress:
        progress = Progress()
        is_end_token = output.finish_reason is FinishReason.EOS and output.token_id in self.tokenizer.eos_token_ids
        if output.token_id >= 0:
            progress.outputs.append(output)
        if output.token_id >= 0 and not is_end_token:
            update = text.push(output.token_id)
            progress.text = update.text
            if update.stop_sequence is not None:
                return self._stopped(progress, update.stop_sequence)
        if output.finish_reason is not None:
            update = text.finish()
            progress.text += update.text
            if update.stop_sequence is not None:
                return self._stopped(progress, update.stop_sequence)
            progress.stop_reason = _stop_reason(output.finish_reason, is_clipped)
        return progress

    def _stopped(self, progress: Progress, stop_sequence: str) -> Progress:
        progress.stop_reason, progress.stop_sequence = pb.STOP_SEQUENCE, stop_sequence
        return progress


def _stop_reason(reason: FinishReason, is_clipped: bool) -> pb.StopReason:
    match reason:
        case FinishReason.EOS:
            return pb.EOS_TOKEN
        case FinishReason.MAX_NEW_TOKENS:
            return pb.TOKEN_LIMIT if is_clipped else pb.MAX_TOKENS
        case FinishReason.CONTEXT_FULL:
            return pb.TOKEN_LIMIT
        case FinishReason.CANCELLED:
            return pb.CANCELLED
        case FinishReason.DEADLINE:
            return pb.TIME_LIMIT
