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

class Adapter(_message.Message):
    __slots__ = ("name", "generation", "digest", "state", "placement", "device_slots", "bytes_host", "bytes_device", "bytes_tensors", "last_used_time", "rank", "target_modules", "expert_count", "base_model", "pinned", "inflight_requests", "load_time", "create_time", "source_path", "warnings", "layers", "error_message", "parts", "derived")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Adapter.State]
        STATE_LOADING: _ClassVar[Adapter.State]
        STATE_READY: _ClassVar[Adapter.State]
        STATE_DRAINING: _ClassVar[Adapter.State]
        STATE_UNLOADED: _ClassVar[Adapter.State]
        STATE_FAILED: _ClassVar[Adapter.State]
        STATE_REGISTERED: _ClassVar[Adapter.State]
    STATE_UNSPECIFIED: Adapter.State
    STATE_LOADING: Adapter.State
    STATE_READY: Adapter.State
    STATE_DRAINING: Adapter.State
    STATE_UNLOADED: Adapter.State
    STATE_FAILED: Adapter.State
    STATE_REGISTERED: Adapter.State
    class Placement(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PLACEMENT_UNSPECIFIED: _ClassVar[Adapter.Placement]
        PLACEMENT_HOST: _ClassVar[Adapter.Placement]
        PLACEMENT_DEVICE: _ClassVar[Adapter.Placement]
        PLACEMENT_DISK: _ClassVar[Adapter.Placement]
    PLACEMENT_UNSPECIFIED: Adapter.Placement
    PLACEMENT_HOST: Adapter.Placement
    PLACEMENT_DEVICE: Adapter.Placement
    PLACEMENT_DISK: Adapter.Placement
    class LayerCoverage(_message.Message):
        __slots__ = ("layer", "experts")
        LAYER_FIELD_NUMBER: _ClassVar[int]
        EXPERTS_FIELD_NUMBER: _ClassVar[int]
        layer: int
        experts: int
        def __init__(self, layer: _Optional[int] = ..., experts: _Optional[int] = ...) -> None: ...
    class Part(_message.Message):
        __slots__ = ("adapter_id", "generation", "weight")
        ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
        GENERATION_FIELD_NUMBER: _ClassVar[int]
        WEIGHT_FIELD_NUMBER: _ClassVar[int]
        adapter_id: str
        generation: int
        weight: float
        def __init__(self, adapter_id: _Optional[str] = ..., generation: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_HOST_FIELD_NUMBER: _ClassVar[int]
    BYTES_DEVICE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TENSORS_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_TIME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_COUNT_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_TIME_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_PATH_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    DERIVED_FIELD_NUMBER: _ClassVar[int]
    name: str
    generation: int
    digest: str
    state: Adapter.State
    placement: Adapter.Placement
    device_slots: _containers.RepeatedScalarFieldContainer[int]
    bytes_host: int
    bytes_device: int
    bytes_tensors: int
    last_used_time: _timestamp_pb2.Timestamp
    rank: int
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    expert_count: int
    base_model: str
    pinned: bool
    inflight_requests: int
    load_time: _duration_pb2.Duration
    create_time: _timestamp_pb2.Timestamp
    source_path: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    layers: _containers.RepeatedCompositeFieldContainer[Adapter.LayerCoverage]
    error_message: str
    parts: _containers.RepeatedCompositeFieldContainer[Adapter.Part]
    derived: bool
    def __init__(self, name: _Optional[str] = ..., generation: _Optional[int] = ..., digest: _Optional[str] = ..., state: _Optional[_Union[Adapter.State, str]] = ..., placement: _Optional[_Union[Adapter.Placement, str]] = ..., device_slots: _Optional[_Iterable[int]] = ..., bytes_host: _Optional[int] = ..., bytes_device: _Optional[int] = ..., bytes_tensors: _Optional[int] = ..., last_used_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., rank: _Optional[int] = ..., target_modules: _Optional[_Iterable[str]] = ..., expert_count: _Optional[int] = ..., base_model: _Optional[str] = ..., pinned: _Optional[bool] = ..., inflight_requests: _Optional[int] = ..., load_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., source_path: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., layers: _Optional[_Iterable[_Union[Adapter.LayerCoverage, _Mapping]]] = ..., error_message: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[Adapter.Part, _Mapping]]] = ..., derived: _Optional[bool] = ...) -> None: ...

class Alias(_message.Message):
    __slots__ = ("alias", "adapter_id")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    alias: str
    adapter_id: str
    def __init__(self, alias: _Optional[str] = ..., adapter_id: _Optional[str] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "source_path", "expected_digest", "pinned", "replace", "expected_generation", "validate_only", "request_id", "lazy")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_PATH_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LAZY_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    source_path: str
    expected_digest: str
    pinned: bool
    replace: bool
    expected_generation: int
    validate_only: bool
    request_id: str
    lazy: bool
    def __init__(self, adapter_id: _Optional[str] = ..., source_path: _Optional[str] = ..., expected_digest: _Optional[str] = ..., pinned: _Optional[bool] = ..., replace: _Optional[bool] = ..., expected_generation: _Optional[int] = ..., validate_only: _Optional[bool] = ..., request_id: _Optional[str] = ..., lazy: _Optional[bool] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter", "already_loaded")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ALREADY_LOADED_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    already_loaded: bool
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., already_loaded: _Optional[bool] = ...) -> None: ...

class ComposeAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "expression", "pinned", "replace", "expected_generation", "validate_only", "request_id")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPRESSION_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    expression: str
    pinned: bool
    replace: bool
    expected_generation: int
    validate_only: bool
    request_id: str
    def __init__(self, adapter_id: _Optional[str] = ..., expression: _Optional[str] = ..., pinned: _Optional[bool] = ..., replace: _Optional[bool] = ..., expected_generation: _Optional[int] = ..., validate_only: _Optional[bool] = ..., request_id: _Optional[str] = ...) -> None: ...

class ComposeAdapterResponse(_message.Message):
    __slots__ = ("adapter", "already_loaded")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ALREADY_LOADED_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    already_loaded: bool
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., already_loaded: _Optional[bool] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name", "expected_generation", "drain_timeout", "force", "allow_missing")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    DRAIN_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    ALLOW_MISSING_FIELD_NUMBER: _ClassVar[int]
    name: str
    expected_generation: int
    drain_timeout: _duration_pb2.Duration
    force: bool
    allow_missing: bool
    def __init__(self, name: _Optional[str] = ..., expected_generation: _Optional[int] = ..., drain_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., force: _Optional[bool] = ..., allow_missing: _Optional[bool] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("adapter", "bytes_device_freed", "bytes_host_freed")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    BYTES_DEVICE_FREED_FIELD_NUMBER: _ClassVar[int]
    BYTES_HOST_FREED_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    bytes_device_freed: int
    bytes_host_freed: int
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., bytes_device_freed: _Optional[int] = ..., bytes_host_freed: _Optional[int] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "state", "name_prefix")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NAME_PREFIX_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    state: Adapter.State
    name_prefix: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., state: _Optional[_Union[Adapter.State, str]] = ..., name_prefix: _Optional[str] = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "next_page_token", "slots_used", "slots_total", "bytes_used", "bytes_limit", "bytes_host_used", "bytes_host_limit", "bytes_vacant")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SLOTS_USED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    BYTES_LIMIT_FIELD_NUMBER: _ClassVar[int]
    BYTES_HOST_USED_FIELD_NUMBER: _ClassVar[int]
    BYTES_HOST_LIMIT_FIELD_NUMBER: _ClassVar[int]
    BYTES_VACANT_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    next_page_token: str
    slots_used: int
    slots_total: int
    bytes_used: int
    bytes_limit: int
    bytes_host_used: int
    bytes_host_limit: int
    bytes_vacant: int
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., slots_used: _Optional[int] = ..., slots_total: _Optional[int] = ..., bytes_used: _Optional[int] = ..., bytes_limit: _Optional[int] = ..., bytes_host_used: _Optional[int] = ..., bytes_host_limit: _Optional[int] = ..., bytes_vacant: _Optional[int] = ...) -> None: ...

class WatchAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchAdaptersResponse(_message.Message):
    __slots__ = ("adapter", "snapshot_complete")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    snapshot_complete: bool
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., snapshot_complete: _Optional[bool] = ...) -> None: ...

class PinAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PinAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class UnpinAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnpinAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class SetAliasRequest(_message.Message):
    __slots__ = ("alias", "adapter_id")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    alias: str
    adapter_id: str
    def __init__(self, alias: _Optional[str] = ..., adapter_id: _Optional[str] = ...) -> None: ...

class SetAliasResponse(_message.Message):
    __slots__ = ("alias",)
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    alias: Alias
    def __init__(self, alias: _Optional[_Union[Alias, _Mapping]] = ...) -> None: ...

class DeleteAliasRequest(_message.Message):
    __slots__ = ("alias",)
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    alias: str
    def __init__(self, alias: _Optional[str] = ...) -> None: ...

class DeleteAliasResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAliasesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAliasesResponse(_message.Message):
    __slots__ = ("aliases",)
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    aliases: _containers.RepeatedCompositeFieldContainer[Alias]
    def __init__(self, aliases: _Optional[_Iterable[_Union[Alias, _Mapping]]] = ...) -> None: ...
