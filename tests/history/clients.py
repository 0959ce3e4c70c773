"""Clients of a storm: each sends one request after the other, in one of several ways, and records what came back."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import replace
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from benchmarks.marked_model import tokens_of
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.fmaas.generation_pb2_grpc import GenerationServiceStub
from tests.history.plan import draw_adapter, draw_prompt
from tests.history.records import Request

STATUS_KEY, ADAPTER_KEY = "grpc-status-details-bin", "graft-adapter"
CALL_TIMEOUT_SECONDS = 120.0


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The reason in a status's ErrorInfo, "" if there is none."""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_KEY:
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return str(info.reason)
    return ""


class Client:
    """One of many; `generations` is shared: what operators and other clients last heard of each name."""

    def __init__(self, channel: grpc.aio.Channel, draw: random.Random, generations: dict[str, int]) -> None:
        self._stub = GenerationServiceStub(channel)
        self._draw = draw
        self._generations = generations

    async def send(self) -> list[Request]:
        """One call, whatever becomes of it: of one prompt as a rule, of two now and then."""
        draw = self._draw
        text, last_token = draw_prompt(draw)
        adapter = draw_adapter(draw, self._generations)
        request = Request(adapter, last_token, draw.randint(10, 24), time.monotonic())
        parameters = pb.Parameters(stopping=pb.StoppingCriteria(max_new_tokens=request.max_new_tokens))
        seconds = CALL_TIMEOUT_SECONDS
        kind = draw.random()
        if kind < 0.04:
            seconds = request.deadline_seconds = draw.uniform(0.005, 0.3)
        elif kind < 0.07:
            request.time_limit_seconds = draw.uniform(0.02, 0.2)
            parameters.stopping.time_limit_millis = max(1, int(request.time_limit_seconds * 1000))
        requests, texts = [request], [text]
        send = self._stream if draw.random() < 0.5 else self._generate
        if send == self._generate and draw.random() < 0.2:
            text, last_token = draw_prompt(draw)
            requests.append(replace(request, last_token=last_token, tokens=[]))
            texts.append(text)
        try:
            await send(requests, texts, parameters, seconds, cancels=0.07 < kind < 0.14)
        except grpc.aio.AioRpcError as error:
            for each in requests:
                each.ended = time.monotonic()
                each.code, each.reason = error.code().name, reason_of(error)
                each.details = error.details() or ""
                _note_trailer(each, error.trailing_metadata())
        return requests

    async def _generate(
        self, requests: list[Request], texts: list[str], parameters: pb.Parameters, seconds: float, *, cancels: bool
    ) -> None:
        prompts = [pb.GenerationRequest(text=text) for text in texts]
        adapter = requests[0].adapter or None
        message = pb.BatchedGenerationRequest(adapter_id=adapter, requests=prompts, params=parameters)
        call = self._stub.Generate(message, timeout=seconds)
        if cancels:
            await asyncio.sleep(self._draw.uniform(0, 0.1))
            if call.cancel():
                for request in requests:
                    _note_cancel(request)
                with contextlib.suppress(asyncio.CancelledError):
                    await call
                return
        responses, ended = (await call).responses, time.monotonic()
        for request, response in zip(requests, responses, strict=True):
            request.ended = ended
            request.tokens, request.stop = tokens_of(response.text), pb.StopReason.Name(response.stop_reason)
            _note_trailer(request, await call.trailing_metadata())

    async def _stream(
        self, requests: list[Request], texts: list[str], parameters: pb.Parameters, seconds: float, *, cancels: bool
    ) -> None:
        (request,), (text,) = requests, texts
        message = pb.SingleGenerationRequest(
            adapter_id=request.adapter or None, request=pb.GenerationRequest(text=text), params=parameters
        )
        call = self._stub.GenerateStream(message, timeout=seconds)
        reading = self._draw.random()
        is_slow, pauses = reading < 0.03, 0.03 <= reading < 0.06
        cancel_after = self._draw.randint(0, 9) if cancels else request.max_new_tokens + 1
        async for response in call:
            if response.text:
                request.first = request.first or time.monotonic()
                request.tokens += tokens_of(response.text)
            if response.stop_reason != pb.NOT_FINISHED:
                request.stop = pb.StopReason.Name(response.stop_reason)
            if len(request.tokens) >= cancel_after and not request.stop:
                call.cancel()
                _note_cancel(request)
                return
            if is_slow:
                await asyncio.sleep(self._draw.uniform(0, 0.3))
            elif pauses and len(request.tokens) > 3:
                pauses, request.paused = False, True
                await asyncio.sleep(self._draw.uniform(0.5, 2.0))
        request.ended = time.monotonic()
        _note_trailer(request, await call.trailing_metadata())


def _note_cancel(request: Request) -> None:
    request.cancelled, request.code, request.ended = True, "CANCELLED", time.monotonic()


def _note_trailer(request: Request, metadata: Any) -> None:
    request.answered_by = next((str(value) for key, value in metadata or () if key == ADAPTER_KEY), "")
