import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Limits(_message.Message):
    __slots__ = ("max_model_len", "max_new_tokens", "default_max_new_tokens", "max_stop_sequences", "max_stop_sequence_bytes", "max_top_n_tokens", "min_temperature", "max_temperature", "max_repetition_penalty", "min_decay_factor", "max_decay_factor", "max_guide_bytes", "max_choices", "max_batch_requests")
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_SEQUENCE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    MAX_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    MAX_REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MIN_DECAY_FACTOR_FIELD_NUMBER: _ClassVar[int]
    MAX_DECAY_FACTOR_FIELD_NUMBER: _ClassVar[int]
    MAX_GUIDE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CHOICES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    max_model_len: int
    max_new_tokens: int
    default_max_new_tokens: int
    max_stop_sequences: int
    max_stop_sequence_bytes: int
    max_top_n_tokens: int
    min_temperature: float
    max_temperature: float
    max_repetition_penalty: float
    min_decay_factor: float
    max_decay_factor: float
    max_guide_bytes: int
    max_choices: int
    max_batch_requests: int
    def __init__(self, max_model_len: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., default_max_new_tokens: _Optional[int] = ..., max_stop_sequences: _Optional[int] = ..., max_stop_sequence_bytes: _Optional[int] = ..., max_top_n_tokens: _Optional[int] = ..., min_temperature: _Optional[float] = ..., max_temperature: _Optional[float] = ..., max_repetition_penalty: _Optional[float] = ..., min_decay_factor: _Optional[float] = ..., max_decay_factor: _Optional[float] = ..., max_guide_bytes: _Optional[int] = ..., max_choices: _Optional[int] = ..., max_batch_requests: _Optional[int] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "model_name", "model_kind", "state", "stalled", "device", "dtype", "parameter_count", "limits", "max_waiting_requests", "max_receive_bytes", "start_time", "max_adapter_requests", "max_adapter_tokens", "replacement_experts")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[GetServerInfoResponse.State]
        STATE_STARTING: _ClassVar[GetServerInfoResponse.State]
        STATE_READY: _ClassVar[GetServerInfoResponse.State]
        STATE_DRAINING: _ClassVar[GetServerInfoResponse.State]
    STATE_UNSPECIFIED: GetServerInfoResponse.State
    STATE_STARTING: GetServerInfoResponse.State
    STATE_READY: GetServerInfoResponse.State
    STATE_DRAINING: GetServerInfoResponse.State
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_RECEIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTER_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPLACEMENT_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    version: str
    model_name: str
    model_kind: str
    state: GetServerInfoResponse.State
    stalled: bool
    device: str
    dtype: str
    parameter_count: int
    limits: Limits
    max_waiting_requests: int
    max_receive_bytes: int
    start_time: _timestamp_pb2.Timestamp
    max_adapter_requests: int
    max_adapter_tokens: int
    replacement_experts: int
    def __init__(self, version: _Optional[str] = ..., model_name: _Optional[str] = ..., model_kind: _Optional[str] = ..., state: _Optional[_Union[GetServerInfoResponse.State, str]] = ..., stalled: _Optional[bool] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., parameter_count: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., max_waiting_requests: _Optional[int] = ..., max_receive_bytes: _Optional[int] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., max_adapter_requests: _Optional[int] = ..., max_adapter_tokens: _Optional[int] = ..., replacement_experts: _Optional[int] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class RunningRequest(_message.Message):
    __slots__ = ("request_id", "correlation_id", "adapter_id", "age", "sequence_count", "generated_token_count")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    correlation_id: str
    adapter_id: str
    age: _duration_pb2.Duration
    sequence_count: int
    generated_token_count: int
    def __init__(self, request_id: _Optional[str] = ..., correlation_id: _Optional[str] = ..., adapter_id: _Optional[str] = ..., age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., sequence_count: _Optional[int] = ..., generated_token_count: _Optional[int] = ...) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("sequences_running", "sequences_waiting", "kv_tokens_used", "kv_tokens_total", "adapter_bytes_used", "adapter_bytes_limit", "estimated_wait", "step_count", "draining", "request_count", "requests", "next_page_token", "sequences_paused")
    SEQUENCES_RUNNING_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_LIMIT_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_WAIT_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    REQUEST_COUNT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_PAUSED_FIELD_NUMBER: _ClassVar[int]
    sequences_running: int
    sequences_waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    adapter_bytes_used: int
    adapter_bytes_limit: int
    estimated_wait: _duration_pb2.Duration
    step_count: int
    draining: bool
    request_count: int
    requests: _containers.RepeatedCompositeFieldContainer[RunningRequest]
    next_page_token: str
    sequences_paused: int
    def __init__(self, sequences_running: _Optional[int] = ..., sequences_waiting: _Optional[int] = ..., kv_tokens_used: _Optional[int] = ..., kv_tokens_total: _Optional[int] = ..., adapter_bytes_used: _Optional[int] = ..., adapter_bytes_limit: _Optional[int] = ..., estimated_wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., step_count: _Optional[int] = ..., draining: _Optional[bool] = ..., request_count: _Optional[int] = ..., requests: _Optional[_Iterable[_Union[RunningRequest, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., sequences_paused: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout",)
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    timeout: _duration_pb2.Duration
    def __init__(self, timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("phase", "running_request_count")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_UNSPECIFIED: _ClassVar[DrainResponse.Phase]
        PHASE_STARTED: _ClassVar[DrainResponse.Phase]
        PHASE_IN_PROGRESS: _ClassVar[DrainResponse.Phase]
        PHASE_COMPLETE: _ClassVar[DrainResponse.Phase]
    PHASE_UNSPECIFIED: DrainResponse.Phase
    PHASE_STARTED: DrainResponse.Phase
    PHASE_IN_PROGRESS: DrainResponse.Phase
    PHASE_COMPLETE: DrainResponse.Phase
    PHASE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUEST_COUNT_FIELD_NUMBER: _ClassVar[int]
    phase: DrainResponse.Phase
    running_request_count: int
    def __init__(self, phase: _Optional[_Union[DrainResponse.Phase, str]] = ..., running_request_count: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id", "correlation_id", "adapter_id", "all")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    correlation_id: str
    adapter_id: str
    all: bool
    def __init__(self, request_id: _Optional[str] = ..., correlation_id: _Optional[str] = ..., adapter_id: _Optional[str] = ..., all: _Optional[bool] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("aborted_count",)
    ABORTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    aborted_count: int
    def __init__(self, aborted_count: _Optional[int] = ...) -> None: ...
