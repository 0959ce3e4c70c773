"""An engine without a model: it answers with the prompt's own tokens, twice if an adapter is named.

Echoing makes every expected text known. The adapter folder's name says what loading it does: `broken` is refused with
two problems, `crash` kills the engine, anything else loads.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.config import EngineConfig
from runtime.engine.messages import (
    AdapterChanged,
    AdapterInfo,
    AdapterReply,
    AddRequest,
    AliasChanged,
    AliasInfo,
    AliasReply,
    CallFailed,
    CancelRequest,
    Command,
    EngineReady,
    EngineStats,
    Event,
    FinishReason,
    ListAdapters,
    LoadAdapter,
    PauseRequest,
    RequestAccepted,
    RequestFailed,
    SequenceOutput,
    SetAlias,
    StepOutputs,
    TopToken,
    UnloadAdapter,
)
from runtime.errors import ErrorKind

MAX_MODEL_LEN = 256


@dataclass
class FakeSequence:
    request: AddRequest
    tokens: list[int]
    num_done: int = 0
    paused: bool = False


class FakeEngine:
    """Same interface as `runtime.engine.engine.Engine`; each step takes FAKE_STEP_SECONDS.

    It says that a new request waits FAKE_WAIT_SECONDS for each that runs.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None]) -> None:
        progress(1, 1)
        if config.max_model_len == 13:
            raise RuntimeError("no luck with 13 tokens")
        if config.max_model_len == 14:
            raise ValueError("max_model_len = 14 is out of range")
        max_model_len = config.max_model_len or MAX_MODEL_LEN
        self.ready = EngineReady("deepseek_v3", max_model_len, 1024, 1, 4096, 1 << 30, "float32")
        self._eos = json.loads((config.model_path / "config.json").read_text())["eos_token_id"]
        self._step_seconds = float(os.environ.get("FAKE_STEP_SECONDS", "0"))
        self._wait_seconds = float(os.environ.get("FAKE_WAIT_SECONDS", "0"))
        self._num_steps = 0
        self._inbox: list[Command] = []
        self._wake = threading.Condition()
        self._running: dict[int, FakeSequence] = {}
        self._adapters: dict[str, AdapterInfo] = {}
        self._aliases: dict[str, str] = {}
        self._generations = 0
        self._max_waiting = config.max_waiting_requests

    def submit(self, command: Command) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def has_work(self) -> bool:
        return bool(self._inbox) or any(not sequence.paused for sequence in self._running.values())

    def wait_for_work(self, timeout_seconds: float) -> bool:
        with self._wake:
            return self._wake.wait_for(self.has_work, timeout_seconds)

    def close(self) -> None:
        pass

    def step(self) -> list[Event]:
        with self._wake:
            inbox, self._inbox = self._inbox, []
        events = [event for command in inbox for event in self._obey(command)]
        batch = [sequence for sequence in self._running.values() if not sequence.paused]
        if batch:
            time.sleep(self._step_seconds)
            self._num_steps += 1
        outputs = [self._advance(sequence) for sequence in batch]
        stats = replace(self.stats(), iteration_tokens=len(outputs))
        return [*events, StepOutputs(outputs, stats)] if outputs else events

    def stats(self) -> EngineStats:
        num_adapters = len(self._adapters)
        return EngineStats(
            running=len(self._running),
            paused=sum(sequence.paused for sequence in self._running.values()),
            kv_tokens_total=4096,
            steps=self._num_steps,
            estimated_wait_seconds=self._wait_seconds * len(self._running),
            adapters_resident=num_adapters,
            adapter_device_bytes=1000 * num_adapters,
        )

    def _advance(self, sequence: FakeSequence) -> SequenceOutput:
        request, params, index = sequence.request, sequence.request.params, sequence.num_done
        if request.deadline is not None and time.time() >= request.deadline:
            del self._running[request.request_id]
            return SequenceOutput(request.request_id, finish_reason=FinishReason.DEADLINE)
        if index >= len(sequence.tokens) and index >= params.min_new_tokens:
            del self._running[request.request_id]
            return SequenceOutput(request.request_id, self._eos, finish_reason=FinishReason.EOS)
        sequence.num_done += 1
        is_last = sequence.num_done == params.max_new_tokens
        if is_last:
            del self._running[request.request_id]
        token = sequence.tokens[index % len(sequence.tokens)]
        return SequenceOutput(
            request.request_id,
            token,
            logprob=-0.5 if params.logprobs else 0.0,
            rank=1 if params.logprobs else 0,
            top_tokens=[TopToken(token + n, -0.5 - n) for n in range(params.num_top_tokens)],
            finish_reason=FinishReason.MAX_NEW_TOKENS if is_last else None,
            queue_seconds=0.0 if index == 0 else None,
        )

    def _obey(self, command: Command) -> list[Event]:
        match command:
            case AddRequest():
                return self._add(command)
            case CancelRequest(request_id):
                self._running.pop(request_id, None)
            case PauseRequest(request_id, paused):
                if (sequence := self._running.get(request_id)) is not None:
                    sequence.paused = paused
            case LoadAdapter():
                return self._load(command)
            case UnloadAdapter(call_id, name, allow_missing):
                if (adapter := self._adapters.pop(name, None)) is None:
                    return [AdapterReply(call_id, []) if allow_missing else _missing(call_id, name)]
                unloaded = replace(adapter, state="UNLOADED", slot=-1, device_bytes=0, freed_device_bytes=1000)
                return [AdapterChanged(unloaded), AdapterReply(call_id, [unloaded])]
            case SetAlias(call_id, alias, adapter):
                self._aliases[alias] = adapter
                told = AliasInfo(alias, adapter)
                return [AliasChanged(told), AliasReply(call_id, [told])]
            case ListAdapters(call_id, name):
                if name and name not in self._adapters:
                    return [_missing(call_id, name)]
                return [AdapterReply(call_id, [a for a in self._adapters.values() if name in ("", a.name)])]
        return []

    def _add(self, request: AddRequest) -> list[Event]:
        if len(self._running) >= self._max_waiting:
            message = f"{len(self._running)} requests wait already"
            kind = ErrorKind.RESOURCE_EXHAUSTED
            return [RequestFailed(request.request_id, kind, message, "QUEUE_FULL", retry_seconds=0.5)]
        if request.adapter in self._aliases:
            request = replace(request, adapter=self._aliases[request.adapter])
        if request.adapter is not None and request.adapter not in self._adapters:
            message = f"there is no adapter {request.adapter!r}"
            return [RequestFailed(request.request_id, ErrorKind.NOT_FOUND, message, "ADAPTER_NOT_FOUND", "adapter_id")]
        accepted: list[Event] = []
        if request.adapter is not None:
            generation = self._adapters[request.adapter].generation
            label = f"{request.adapter}@{generation}"
            accepted = [RequestAccepted(request.request_id, request.adapter, generation, label)]
        tokens = request.prompt_ids[1:] or request.prompt_ids
        self._running[request.request_id] = FakeSequence(request, tokens * 2 if request.adapter else tokens)
        return accepted

    def _load(self, command: LoadAdapter) -> list[Event]:
        folder = Path(command.path)
        if folder.name == "crash":
            raise RuntimeError("the device fell off the bus")
        if folder.name == "broken":
            return _failed(
                command.call_id,
                ErrorKind.FAILED_PRECONDITION,
                "2 problems in the file",
                "ADAPTER_BAD",
                problems=[f"{folder}: layer 3: wrong shape", "layer 4: not finite"],
            )
        digest = f"sha256:{folder.name}"
        if command.expected_digest not in ("", digest):
            return _failed(
                command.call_id,
                ErrorKind.FAILED_PRECONDITION,
                "another digest",
                "DIGEST_MISMATCH",
                field="expected_digest",
            )
        live = self._adapters.get(command.name)
        if live is not None and live.digest == digest:
            return [AdapterReply(command.call_id, [replace(live, already_loaded=True)])]
        if live is not None and not command.replace:
            return _failed(
                command.call_id,
                ErrorKind.ALREADY_EXISTS,
                "other bytes have this name",
                "ADAPTER_EXISTS",
                field="adapter_id",
            )
        self._generations += 1
        info = AdapterInfo(
            command.name,
            self._generations,
            digest,
            "READY",
            lora_rank_max=8,
            num_expert_pages=4,
            target_modules=["experts"],
            device_bytes=1000,
            tensor_bytes=990,
            slot=len(self._adapters),
            load_seconds=0.25,
            created=time.time(),
            source_path=command.path,
            pinned=command.pinned,
        )
        self._adapters[command.name] = info
        return [AdapterChanged(info), AdapterReply(command.call_id, [info])]


def _failed(*args: object, **details: object) -> list[Event]:
    return [CallFailed(*args, **details)]  # type: ignore[arg-type]


def _missing(call_id: int, name: str) -> CallFailed:
    return CallFailed(call_id, ErrorKind.NOT_FOUND, f"there is no adapter {name!r}", "ADAPTER_NOT_FOUND", "name")
