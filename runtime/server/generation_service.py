"""`fmaas.GenerationService`: the TGIS contract, as its existing clients know it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias

import grpc

from runtime.adapters.expression import parse_expression
from runtime.engine.messages import TokenScore
from runtime.errors import InvalidRequest, NotFound
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.fmaas import generation_pb2_grpc as pb_grpc
from runtime.server.adapter_quotas import AdapterQuotas, Places
from runtime.server.admission import Admission
from runtime.server.calls import Call
from runtime.server.engine_client import EngineClient
from runtime.server.gate import Gate
from runtime.server.generation import PreparedRequest, TextGenerator
from runtime.server.responses import delta, head
from runtime.server.validation import validate_adapter_id, validate_parameters

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class GenerationService(pb_grpc.GenerationServiceServicer):
    """The four RPCs. `generator` is set when the engine is ready; until then the gate is shut."""

    generator: TextGenerator

    def __init__(
        self,
        client: EngineClient,
        gate: Gate,
        quotas: AdapterQuotas,
        register: Callable[[str | None], Awaitable[None]],
    ) -> None:
        """`register` lets the engine know an adapter that lies under the adapters root, before it is asked for."""
        self._client = client
        self._gate = gate
        self._register = register
        self._admission = Admission(client, gate, quotas)

    async def Generate(self, request: pb.BatchedGenerationRequest, context: Context) -> pb.BatchedGenerationResponse:
        """All texts of the batch, or one error for all of it."""
        with self._admission.enter(context) as call, _tgis_errors():
            adapter = validate_adapter_id(request.adapter_id, request.prefix_id)
            call.adapter = adapter or ""
            limits = self.generator.limits
            options = validate_parameters(request.params, limits)
            if len(request.requests) > limits.max_batch_requests:
                message = f"{len(request.requests)} requests in one batch; the limit is {limits.max_batch_requests}"
                raise InvalidRequest(message, reason="BATCH_TOO_LARGE", field="requests")
            with self._admission.places(context, adapter, len(request.requests)) as places:
                await self._register(adapter)
                prepared = [
                    await self.generator.prepare(item.text, options, adapter, f"requests[{index}].text")
                    for index, item in enumerate(request.requests)
                ]
                places.add_tokens([item.num_tokens for item in prepared])
                return pb.BatchedGenerationResponse(responses=await self._complete_all(prepared, call, places))

    async def GenerateStream(
        self, request: pb.SingleGenerationRequest, context: Context
    ) -> AsyncIterator[pb.GenerationResponse]:
        """First the input's count, then pieces of text, and the stop reason with the last."""
        with self._admission.enter(context) as call, _tgis_errors():
            adapter = validate_adapter_id(request.adapter_id, request.prefix_id)
            call.adapter = adapter or ""
            options = validate_parameters(request.params, self.generator.limits)
            with self._admission.places(context, adapter, 1) as places:
                await self._register(adapter)
                prepared = await self.generator.prepare(request.request.text, options, adapter, "request.text")
                places.add_tokens([prepared.num_tokens])
                async with aclosing(self.generator.run(prepared, call)) as progresses:
                    is_first = True
                    scores: list[TokenScore] = []
                    async for progress in progresses:
                        scores += progress.prompt_scores
                        if is_first and (progress.outputs or progress.stop_reason != pb.NOT_FINISHED):
                            await context.send_initial_metadata(call.metadata)
                            yield head(prepared, scores, self.generator.tokenizer)
                            is_first = False
                        response = delta(prepared, progress, self.generator.tokenizer)
                        if response.text or response.tokens or response.stop_reason != pb.NOT_FINISHED:
                            yield response

    async def Tokenize(self, request: pb.BatchedTokenizeRequest, context: Context) -> pb.BatchedTokenizeResponse:
        """Counts, and on request the tokens and their places in the text."""
        self._gate.check()
        with _tgis_errors():
            if adapter := validate_adapter_id(request.adapter_id, request.prefix_id):
                await self._register(adapter)
                for term in parse_expression(adapter):
                    await self._client.list_adapters(term.reference)
            limit = self.generator.limits.max_batch_requests
            if len(request.requests) > limit:
                message = f"{len(request.requests)} texts in one batch; the limit is {limit}"
                raise InvalidRequest(message, reason="BATCH_TOO_LARGE", field="requests")
            responses = [await asyncio.to_thread(self._tokenize_one, item.text, request) for item in request.requests]
        return pb.BatchedTokenizeResponse(responses=responses)

    async def ModelInfo(self, request: pb.ModelInfoRequest, context: Context) -> pb.ModelInfoResponse:
        """The kind of model and its limits."""
        self._gate.check()
        limits = self.generator.limits
        return pb.ModelInfoResponse(
            model_kind=pb.ModelInfoResponse.DECODER_ONLY,
            max_sequence_length=limits.max_model_len,
            max_new_tokens=limits.max_new_tokens,
        )

    async def _complete_all(
        self, prepared: list[PreparedRequest], call: Call, places: Places
    ) -> list[pb.GenerationResponse]:
        """Run all together; the first failure ends the others."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._complete(item, call, places)) for item in prepared]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _complete(self, prepared: PreparedRequest, call: Call, places: Places) -> pb.GenerationResponse:
        response = pb.GenerationResponse()
        texts: list[str] = []
        scores: list[TokenScore] = []
        async with aclosing(self.generator.run(prepared, call)) as progresses:
            async for progress in progresses:
                scores += progress.prompt_scores
                texts.append(progress.text)
                response.MergeFrom(delta(prepared, progress, self.generator.tokenizer))
        places.end_one(prepared.num_tokens)
        first = head(prepared, scores, self.generator.tokenizer)
        response.MergeFrom(first)
        response.text = first.text + "".join(texts)
        return response

    def _tokenize_one(self, text: str, request: pb.BatchedTokenizeRequest) -> pb.TokenizeResponse:
        tokenizer = self.generator.tokenizer
        token_ids, offsets = tokenizer.encode_with_offsets(text)
        places = self.generator.kept_places(token_ids, request.truncate_input_tokens)
        token_ids, offsets = [token_ids[place] for place in places], [offsets[place] for place in places]
        response = pb.TokenizeResponse(token_count=len(token_ids))
        if request.return_tokens:
            response.tokens.extend(tokenizer.token_piece(token_id) for token_id in token_ids)
        if request.return_offsets:
            response.offsets.extend(pb.TokenizeResponse.Offset(start=start, end=end) for start, end in offsets)
        return response


@contextmanager
def _tgis_errors() -> Iterator[None]:
    """TGIS clients know an unknown adapter as INVALID_ARGUMENT; the reason still says what it is."""
    try:
        yield
    except NotFound as error:
        raise InvalidRequest(error.message, reason=error.reason, field="adapter_id") from error
