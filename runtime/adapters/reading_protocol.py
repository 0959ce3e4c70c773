"""What the engine says to its reading process and back: frames of msgpack, and pages as segments of memory.

A frame is a length, then [class name, field, ...]. The descriptor of a segment that is new comes with the length.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

import msgpack
import torch

from loaders.adapter import AdapterTargets, ExpertShape
from runtime.adapters.folder_reader import FolderRules, ReadAdapter
from runtime.adapters.host_adapter import FactorLayout, HostAdapter, SharedOuterPages
from runtime.adapters.info import LayerCoverage
from runtime.adapters.page_pool import HostPages
from runtime.adapters.record import AdapterFacts
from runtime.adapters.replacement_experts import LayerReplacement, SpareRoom
from runtime.adapters.shared_arena import SharedArena
from runtime.adapters.shared_pages import Memory, tensor_over
from runtime.errors import ErrorKind, GraftError, error_of_kind
from runtime.models.deepseek.moe import ExpertGroups

MAX_FRAME_BYTES = 64 * 2**20
_LENGTH = struct.Struct(">I")
Plain = list[Any]


@dataclass(frozen=True)
class ReadingSetup:
    """The engine's first words: FolderRules as plain data, and how far its process stands back for others."""

    linears: Plain
    experts: Plain
    num_hidden_layers: int
    model_type: str | None
    max_lora_rank: int
    max_bytes: int
    dtype: str
    rank_multiple: int
    a_rows_first: bool
    spare: Plain
    niceness: int | None

    @classmethod
    def of(cls, rules: FolderRules, niceness: int | None) -> ReadingSetup:
        """The rules as they are sent."""
        targets = rules.targets
        return cls(
            [[name, *dims] for name, dims in targets.linears.items()],
            [[layer, s.num_experts, s.hidden, s.intermediate] for layer, s in targets.experts.items()],
            targets.num_hidden_layers,
            targets.model_type,
            rules.max_lora_rank,
            rules.max_bytes,
            str(rules.dtype).removeprefix("torch."),
            rules.layout.rank_multiple,
            rules.layout.a_rows_first,
            list(astuple(rules.spare)),
            niceness,
        )

    def rules(self) -> FolderRules:
        """The rules as they were."""
        targets = AdapterTargets(
            {name: (num_out, num_in) for name, num_out, num_in in self.linears},
            {layer: ExpertShape(*shape) for layer, *shape in self.experts},
            self.num_hidden_layers,
            self.model_type,
        )
        layout = FactorLayout(self.rank_multiple, self.a_rows_first)
        dtype = getattr(torch, self.dtype)
        return FolderRules(targets, self.max_lora_rank, self.max_bytes, dtype, layout, SpareRoom(*self.spare))


@dataclass(frozen=True)
class Ready:
    """The process can read."""


@dataclass(frozen=True)
class ReadFolder:
    """Read a folder; `digest` is empty if it may be any."""

    name: str
    path: str
    digest: str


@dataclass(frozen=True)
class Vacated:
    """The engine has no tensor over these segments any more."""

    segments: Plain


@dataclass(frozen=True)
class FolderRead:
    """A ReadAdapter whose pages lie in a segment; those in `dropped` will not be used again."""

    segment: int
    dropped: Plain
    digest: str
    seconds: float
    facts: Plain
    linears: Plain
    experts: Plain
    shared_outer: Plain
    replaced: Plain


@dataclass(frozen=True)
class FolderRefused:
    """The GraftError that reading ended with."""

    kind: str
    message: str
    reason: str
    field: str
    problems: Plain

    @classmethod
    def of(cls, error: GraftError) -> FolderRefused:
        """The error as it is sent."""
        return cls(str(error.kind), error.message, error.reason, error.field, list(error.problems))

    def error(self) -> GraftError:
        """The error as it was."""
        return error_of_kind(
            ErrorKind(self.kind), self.message, reason=self.reason, field=self.field, problems=self.problems
        )


Message = ReadingSetup | Ready | ReadFolder | Vacated | FolderRead | FolderRefused
_CLASSES: dict[str, type[Message]] = {
    cls.__name__: cls for cls in (ReadingSetup, Ready, ReadFolder, Vacated, FolderRead, FolderRefused)
}


def send(connection: socket.socket, message: Message, fd: int | None = None) -> None:
    """One message, and with it a descriptor; raises OSError."""
    body = msgpack.packb([type(message).__name__, *(getattr(message, field.name) for field in fields(message))])
    length = _LENGTH.pack(len(body))
    if fd is None:
        connection.sendall(length)
    else:
        socket.send_fds(connection, [length], [fd])  # four bytes are never sent in part
    connection.sendall(body)


def receive(connection: socket.socket) -> tuple[Message, int | None]:
    """The next message and the descriptor that came with it; raises EOFError or OSError when the other side is gone."""
    length, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
    while 0 < len(length) < _LENGTH.size:
        length += connection.recv(_LENGTH.size - len(length))
    if not length:
        raise EOFError
    (num_bytes,) = _LENGTH.unpack(length)
    if num_bytes > MAX_FRAME_BYTES:
        raise OSError(f"a frame of {num_bytes} bytes is over {MAX_FRAME_BYTES}")
    with connection.makefile("rb", buffering=0) as stream:
        body = _read_all(stream, num_bytes)
    name, *values = msgpack.unpackb(body, strict_map_key=False)
    return _CLASSES[name](*values), (fds[0] if fds else None)


def _read_all(stream: Any, num_bytes: int) -> bytearray:
    body = bytearray(num_bytes)
    view, done = memoryview(body), 0
    while done < num_bytes:
        count = stream.readinto(view[done:])
        if not count:
            raise EOFError
        done += count
    return body


def as_message(read: ReadAdapter, arena: SharedArena, dropped: Plain) -> tuple[FolderRead, int | None]:
    """What was read into an arena, as it is sent, and the descriptor that goes with it."""
    facts = read.facts
    told = [getattr(facts, field.name) for field in fields(facts) if field.name != "layers"]
    told.append([[coverage.layer, coverage.num_experts] for coverage in facts.layers])
    linears = [[name, _plain(pages, arena)] for name, pages in read.host.linears.items()]
    experts = [[layer, [_plain(pages, arena) for pages in own]] for layer, own in read.host.experts.items()]
    shared = [
        [layer, _plain(own.outer, arena), _plain(own.inner, arena)] for layer, own in read.host.shared_outer.items()
    ]
    replaced = [
        [layer, own.experts, [_placed(weight, arena) for weight in (own.groups.w13, own.groups.w2)]]
        for layer, own in read.host.replaced.items()
    ]
    segment, fd = arena.lend()
    return FolderRead(segment, dropped, read.digest, read.seconds, told, linears, experts, shared, replaced), fd


def as_read_adapter(message: FolderRead, memory: Memory, rules: FolderRules) -> ReadAdapter:
    """The adapter again, its pages over its segment's memory. Raises ValueError."""
    names = [field.name for field in fields(AdapterFacts) if field.name != "layers"]
    *told, layers = message.facts
    known: Mapping[str, Any] = dict(zip(names, told, strict=True))
    facts = AdapterFacts(**known, layers=[LayerCoverage(*coverage) for coverage in layers])
    host = HostAdapter(
        {name: _pages(plain, memory, rules) for name, plain in message.linears},
        {layer: [_pages(plain, memory, rules) for plain in own] for layer, own in message.experts},
        {
            layer: SharedOuterPages(_pages(outer, memory, rules), _pages(inner, memory, rules))
            for layer, outer, inner in message.shared_outer
        },
        {layer: _replacement(experts, places, memory, rules) for layer, experts, places in message.replaced},
    )
    return ReadAdapter(message.digest, host, facts, message.seconds)


def _plain(pages: HostPages, arena: SharedArena) -> Plain:
    return [pages.lora_rank, pages.regions, [[name, *_placed(factor, arena)] for name, factor in pages.factors.items()]]


def _placed(tensor: torch.Tensor, arena: SharedArena) -> Plain:
    place = arena.place(tensor)
    return [list(place.shape), place.offset]


def _replacement(
    experts: list[int], places: Plain, memory: Memory, rules: FolderRules
) -> LayerReplacement:
    w13, w2 = (tensor_over(memory, shape, offset, rules.dtype) for shape, offset in places)
    return LayerReplacement(experts, ExpertGroups(w13, w2))


def _pages(plain: Plain, memory: Memory, rules: FolderRules) -> HostPages:
    lora_rank, regions, places = plain
    factors = {name: tensor_over(memory, shape, offset, rules.dtype) for name, shape, offset in places}
    return HostPages(lora_rank, regions, factors, rules.layout.a_rows_first)
