"""One request's life in the front-end, whatever protocol it came by: prepare, run, cut at stops, clean up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from loaders.tokenizer import IncrementalDetokenizer, Tokenizer
from runtime.engine.messages import FinishReason, PromptScored, SequenceOutput, TokenScore
from runtime.engine.sampling_params import SamplingParams
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.server.calls import Call
from runtime.server.engine_client import EngineClient
from runtime.server.limits import Limits
from runtime.server.metric_adapters import label_of
from runtime.server.metrics import Metrics
from runtime.server.output_stream import StreamItem
from runtime.server.request_timer import RequestTimer
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

    @property
    def num_tokens(self) -> int:
        """The most tokens that prompt and answer may come to."""
        return len(self.prompt_ids) + self.params.max_new_tokens


@dataclass(slots=True)
class Progress:
    """What is new since the last one; `stop_reason` is set on the last.

    `prompt_scores` are those of the next prompt tokens, from the second on; all of them come before the first output.
    """

    text: str = ""
    outputs: list[SequenceOutput] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
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
        name = request.adapter and label_of(request.adapter, self._client.adapter_named)
        timer = self._metrics.start_request(len(request.prompt_ids), name, request.arrived)
        try:
            call.attach(stream)
            while True:
                progress = Progress(num_generated=num_generated)
                for item in await stream.take():
                    self._advance(progress, text, item, request.is_clipped, timer)
                    if progress.stop_reason != pb.NOT_FINISHED:
                        break
                call.num_tokens += progress.num_generated - num_generated
                num_generated = progress.num_generated
                if progress.stop_reason != pb.NOT_FINISHED:
                    timer.success(pb.StopReason.Name(progress.stop_reason))
                yield progress
                if progress.stop_reason != pb.NOT_FINISHED:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            stream.raise_if_lost()
            raise
        finally:
            timer.close()
            stream.close()

    def _advance(
        self, progress: Progress, text: TextStream, item: StreamItem, is_clipped: bool, timer: RequestTimer
    ) -> None:
        """Add what the engine sent; `stop_reason` is set if that was the last."""
        if isinstance(item, PromptScored):
            progress.prompt_scores += item.scores
            return
        stop_sequence = None
        if item.token_id >= 0:
            timer.token(item.queue_seconds)
            progress.num_generated += 1
            progress.outputs.append(item)
            is_end_token = item.finish_reason is FinishReason.EOS and item.token_id in self.tokenizer.eos_token_ids
            if not is_end_token:
                update = text.push(item.token_id)
                progress.text += update.text
                stop_sequence = update.stop_sequence
        if item.finish_reason is not None and stop_sequence is None:
            progress.stop_reason = _stop_reason(item.finish_reason, is_clipped)
            update = text.finish()
            progress.text += update.text
            stop_sequence = update.stop_sequence
        if stop_sequence is not None:
            progress.stop_reason, progress.stop_sequence = pb.STOP_SEQUENCE, stop_sequence


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
