"""Messages over a local socket: a length, then msgpack of [class name, [field, field, ...]]. Never pickle.

StepOutputs, sent at every step, travels in columns: [request ids], [token ids], and what is more than that, by place.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
import types
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import msgpack

from runtime.config import EngineConfig
from runtime.engine import messages as m

MAX_FRAME_BYTES = 64 * 2**20
_LENGTH = struct.Struct(">I")

Message = m.Command | m.Event | EngineConfig
Decoder = Callable[[object], typing.Any]


class TransportError(Exception):
    """The other side sent something that is not a message of ours."""


def encode(message: Message) -> bytes:
    """One frame: four bytes of length and the body."""
    fields = _columns_of(message) if type(message) is m.StepOutputs else _fields_of(message)
    body: bytes = msgpack.packb([type(message).__name__, fields], default=_fields_of)
    if len(body) > MAX_FRAME_BYTES:
        raise TransportError(f"a {type(message).__name__} of {len(body)} bytes is over {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """The message of one frame's body; every field is checked against its declared type."""
    try:
        name, fields = msgpack.unpackb(body)
        return typing.cast(Message, _DECODERS[name](fields))
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
        raise TransportError(f"not a message: {error}") from error


def _fields_of(value: object) -> list[object] | str:
    """How msgpack writes what it does not know: a dataclass as the list of its fields, a path as text."""
    if isinstance(value, Path):
        return str(value)
    return [getattr(value, name) for name in _FIELD_NAMES[type(value)]]


def _columns_of(message: m.StepOutputs) -> list[object]:
    """Most outputs are a token and nothing else: 32 of them take a tenth of the time that 32 lists of fields take."""
    request_ids, token_ids, others = [], [], []
    for place, output in enumerate(message.outputs):
        request_ids.append(output.request_id)
        token_ids.append(output.token_id)
        if _has_more(output):
            others.append([place, output])
    return [request_ids, token_ids, others, message.stats]


def _has_more(output: m.SequenceOutput) -> bool:
    return (
        output.finish_reason is not None
        or output.rank != 0
        or output.logprob != 0.0
        or output.queue_seconds is not None
        or bool(output.top_tokens)
    )


def _decode_columns(value: object) -> m.StepOutputs:
    request_ids, token_ids, others, stats = _checked(list, value)
    plain_ids, plain_tokens = _plain_list(int, request_ids), _plain_list(int, token_ids)
    if len(plain_ids) != len(plain_tokens):
        raise ValueError(f"{len(plain_ids)} request ids for {len(plain_tokens)} tokens")
    outputs = list(map(m.SequenceOutput, plain_ids, plain_tokens))
    for place, output in _checked(list, others):
        if not 0 <= _checked(int, place) < len(outputs):
            raise ValueError(f"there is no output {place}")
        outputs[place] = _decode_output(output)
    return m.StepOutputs(outputs, _decode_stats(stats))


def _decoder_of(annotation: typing.Any) -> Decoder:
    """A function that checks and rebuilds one value of the annotated type."""
    if isinstance(annotation, typing.NewType):
        return _decoder_of(annotation.__supertype__)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return _list_decoder(arguments[0])
    if origin in (typing.Union, types.UnionType):
        (inner,) = (a for a in arguments if a is not type(None))
        decode_inner = _decoder_of(inner)
        return lambda value: None if value is None else decode_inner(value)
    if dataclasses.is_dataclass(annotation):
        return _dataclass_decoder(typing.cast(type, annotation))
    if issubclass(annotation, Enum):
        return typing.cast(Decoder, annotation)
    if annotation is Path:
        return lambda value: Path(_checked(str, value))
    return lambda value: _checked(annotation, value)


def _checked(kind: type, value: object) -> typing.Any:
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise TypeError(f"{value!r} is not of type {kind.__name__}")


def _list_decoder(item: typing.Any) -> Decoder:
    if item in (int, str):
        return lambda value: _plain_list(item, value)
    decode_item = _decoder_of(item)
    return lambda value: [decode_item(element) for element in _checked(list, value)]


def _plain_list(item: type, value: object) -> list[typing.Any]:
    if type(value) is not list or set(map(type, value)) - {item}:
        raise TypeError(f"not a list of {item.__name__}")
    return value


def _dataclass_decoder(cls: type) -> Decoder:
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    _FIELD_NAMES[cls] = names
    decoders = [_decoder_of(hints[name]) for name in names]

    def decode_fields(value: object) -> object:
        if type(value) is not list or len(value) != len(decoders):
            raise TypeError(f"{cls.__name__} has {len(decoders)} fields")
        return cls(*[decode_field(element) for decode_field, element in zip(decoders, value, strict=True)])

    return decode_fields


_FIELD_NAMES: dict[type, list[str]] = {}
_DECODERS: dict[str, Decoder] = {cls.__name__: _dataclass_decoder(cls) for cls in typing.get_args(Message)}
_DECODERS[m.StepOutputs.__name__] = _decode_columns
_decode_output = _dataclass_decoder(m.SequenceOutput)
_decode_stats = _dataclass_decoder(m.EngineStats)


class Connection:
    """The engine's end: blocking, one thread may send while another receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._stream = sock.makefile("rb")

    def send(self, message: Message) -> None:
        """Write one message; raises OSError if the other side is gone."""
        self._socket.sendall(encode(message))

    def receive(self) -> Message | None:
        """The next message, or None when the other side has closed."""
        header = self._stream.read(_LENGTH.size)
        if len(header) < _LENGTH.size:
            return None
        body = self._stream.read(_checked_length(header))
        return decode(body)

    def close(self) -> None:
        """Close both directions."""
        self._stream.close()
        self._socket.close()


async def receive(reader: asyncio.StreamReader) -> Message | None:
    """The front-end's end of the same: the next message, or None when the engine has closed."""
    try:
        header = await reader.readexactly(_LENGTH.size)
        return decode(await reader.readexactly(_checked_length(header)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _checked_length(header: bytes) -> int:
    length = int(_LENGTH.unpack(header)[0])
    if length > MAX_FRAME_BYTES:
        raise TransportError(f"a frame of {length} bytes is over {MAX_FRAME_BYTES}")
    return length
