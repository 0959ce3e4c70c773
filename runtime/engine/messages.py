"""What the front-end and the engine say to each other: plain data that survives a process border."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from enum import StrEnum
from typing import NewType

from runtime.adapters.info import AdapterInfo as AdapterInfo
from runtime.adapters.info import AliasInfo as AliasInfo
from runtime.adapters.info import PartInfo as PartInfo
from runtime.engine.sampling_params import SamplingParams
from runtime.errors import ErrorKind

RequestId = NewType("RequestId", int)
CallId = NewType("CallId", int)


class FinishReason(StrEnum):
    """Why the engine ended a sequence; stop sequences are text and belong to the front-end."""

    EOS = "eos"
    MAX_NEW_TOKENS = "max_new_tokens"
    CONTEXT_FULL = "context_full"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


# front-end -> engine


@dataclass(frozen=True)
class AddRequest:
    """Start a sequence. `adapter` is NAME, NAME@GENERATION or a weighted sum of such.

    `deadline` is Unix time in seconds; when it passes, the sequence ends with DEADLINE.
    """

    request_id: RequestId
    prompt_ids: list[int]
    params: SamplingParams
    adapter: str | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class CancelRequest:
    """Free everything a request holds; no further output is sent for it. Unknown ids are ignored."""

    request_id: RequestId


@dataclass(frozen=True)
class PauseRequest:
    """Keep a request out of the coming steps, or let it go on: its reader is slow. Unknown ids are ignored."""

    request_id: RequestId
    paused: bool


@dataclass(frozen=True)
class LoadAdapter:
    """Load the adapter folder at an absolute, already authorised path under a name.

    `replace`: other bytes than those of the live generation become a new one. `expected_generation`: the live one must
    be this. `validate_only`: read, check and tell, but change nothing. `lazy`: only register it; it is read when a
    request names it. A repeated `request_id` gets the answer that the first one got. With an `expression` and no path,
    the adapter is that sum of others.
    """

    call_id: CallId
    name: str
    path: str = ""
    expected_digest: str = ""
    replace: bool = False
    expected_generation: int = 0
    validate_only: bool = False
    pinned: bool = False
    lazy: bool = False
    request_id: str = ""
    expression: str = ""


@dataclass(frozen=True)
class UnloadAdapter:
    """Take no new requests for a name; its memory is freed when the last running request ends.

    `force` ends the running ones with ABORTED. The answer comes when all is free; after `drain_seconds` at the latest,
    then as DEADLINE_EXCEEDED, and the draining goes on.
    """

    call_id: CallId
    name: str
    allow_missing: bool = False
    expected_generation: int = 0
    drain_seconds: float | None = None
    force: bool = False


@dataclass(frozen=True)
class PinAdapter:
    """Keep an adapter on the device, or let it go again when others need its place."""

    call_id: CallId
    name: str
    pinned: bool = True


@dataclass(frozen=True)
class SetAlias:
    """From now on requests that name the alias get this adapter; with an empty adapter the alias is forgotten."""

    call_id: CallId
    alias: str
    adapter: str = ""


@dataclass(frozen=True)
class ListAliases:
    """Ask for all aliases."""

    call_id: CallId


@dataclass(frozen=True)
class ListAdapters:
    """Ask for all generations of all adapters, or for one by NAME, ALIAS or NAME@GENERATION (unknown: NOT_FOUND)."""

    call_id: CallId
    name: str = ""


@dataclass(frozen=True)
class Shutdown:
    """End the engine process after the current step."""


# engine -> front-end


@dataclass(frozen=True)
class EngineReady:
    """The base is loaded and one token was generated. `max_model_len` counts prompt and output tokens.

    `dtype` is that of weights and activations, by PyTorch's name.
    """

    model_kind: str
    max_model_len: int
    vocab_size: int
    num_parameters: int
    kv_cache_tokens: int
    adapter_bytes_limit: int
    dtype: str = ""
    adapter_host_bytes_limit: int = 0


@dataclass(frozen=True)
class TopToken:
    """An alternative for one position."""

    token_id: int
    logprob: float


@dataclass(slots=True)
class SequenceOutput:
    """One new token of one sequence (`token_id` -1: none, only the end is told), and the end if it came.

    The first output of a request may tell in `queue_seconds` how long it waited for its first step. Not frozen like its
    neighbours, though nothing changes one: there is one for each token, and freezing makes it four times as slow.
    """

    request_id: RequestId
    token_id: int = -1
    logprob: float = 0.0
    rank: int = 0
    top_tokens: list[TopToken] = dataclass_field(default_factory=list)
    finish_reason: FinishReason | None = None
    queue_seconds: float | None = None


@dataclass(frozen=True)
class TokenScore:
    """What the model thought of a token that was given: its log-probability, rank (from 1) and the alternatives."""

    logprob: float
    rank: int
    top_tokens: list[TopToken] = dataclass_field(default_factory=list)


@dataclass(frozen=True)
class PromptScored:
    """Scores of the next prompt tokens of a request, in order from its second token on; before its first output."""

    request_id: RequestId
    scores: list[TokenScore]


@dataclass(frozen=True)
class EngineStats:
    """Counters (monotonic) and gauges of the engine, sent with outputs.

    `running` sequences have begun; `paused` ones are those of them that wait for their readers.
    `iteration_tokens` counts what the step computed that these come with; 0 if they come with none.
    `estimated_wait_seconds` is how long a request that came now would wait for its first step, by the pace of the
    last seconds; 0 if none waits. Of each tier of adapters, `hits` are requests that found theirs there, `loads`
    adapters that came in, and `evictions` those that had to leave; waiting requests are counted by what they wait for.
    """

    running: int = 0
    waiting: int = 0
    paused: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    adapters_resident: int = 0
    adapter_device_bytes: int = 0
    adapter_host_bytes: int = 0
    iteration_tokens: int = 0
    estimated_wait_seconds: float = 0.0
    adapter_device_hits: int = 0
    adapter_device_loads: int = 0
    adapter_device_evictions: int = 0
    adapter_host_hits: int = 0
    adapter_host_loads: int = 0
    adapter_host_evictions: int = 0
    waiting_for_files: int = 0
    waiting_for_device: int = 0


@dataclass(frozen=True)
class StepOutputs:
    """Everything one step produced."""

    outputs: list[SequenceOutput]
    stats: EngineStats


@dataclass(frozen=True)
class RequestFailed:
    """A request that was refused or broken off with an error; `retry_seconds` is that of the error."""

    request_id: RequestId
    kind: ErrorKind
    message: str
    reason: str
    field: str = ""
    retry_seconds: float | None = None


@dataclass(frozen=True)
class RequestAccepted:
    """The generation that will answer a request which names an adapter; before anything else about it.

    `label` is NAME@GENERATION, or the weighted sum of such for which `adapter` was made.
    """

    request_id: RequestId
    adapter: str
    generation: int
    label: str


@dataclass(frozen=True)
class AdapterReply:
    """Answer to LoadAdapter, UnloadAdapter, PinAdapter and ListAdapters."""

    call_id: CallId
    adapters: list[AdapterInfo]


@dataclass(frozen=True)
class AliasReply:
    """Answer to SetAlias and ListAliases: the aliases that it is about."""

    call_id: CallId
    aliases: list[AliasInfo]


@dataclass(frozen=True)
class AdapterChanged:
    """A generation has changed its state, its place or its pin; sent in the order in which that happened."""

    adapter: AdapterInfo


@dataclass(frozen=True)
class AliasChanged:
    """An alias stands for another adapter from now on; for none, "", if it was deleted."""

    alias: AliasInfo


@dataclass(frozen=True)
class CallFailed:
    """An adapter call that failed; `problems` lists each defect of a refused file."""

    call_id: CallId
    kind: ErrorKind
    message: str
    reason: str
    field: str = ""
    problems: list[str] = dataclass_field(default_factory=list)
    retry_seconds: float | None = None


@dataclass(frozen=True)
class EngineFailed:
    """The engine cannot go on (or could not start); the process exits after this message."""

    message: str


AdapterCall = LoadAdapter | UnloadAdapter | PinAdapter | SetAlias | ListAliases | ListAdapters
Command = AddRequest | CancelRequest | PauseRequest | AdapterCall | Shutdown
Reply = AdapterReply | AliasReply | CallFailed
RequestEvent = RequestAccepted | PromptScored | RequestFailed
Event = EngineReady | StepOutputs | RequestEvent | AdapterChanged | AliasChanged | Reply | EngineFailed
