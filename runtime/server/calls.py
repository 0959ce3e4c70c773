"""The generation calls that the server works on: who they are, how far they have come, and how to end one."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.errors import GraftError, InvalidRequest
from runtime.server.output_stream import OutputStream

REQUEST_ID_KEY = "x-request-id"
CORRELATION_ID_KEY = "x-correlation-id"
ADAPTER_KEY = "graft-adapter"
MAX_CORRELATION_ID_CHARS = 128


@dataclass(eq=False)
class Call:
    """One call of Generate or GenerateStream; a batch has a stream for each of its prompts.

    `serial` counts calls since the server started, `started` is monotonic time in seconds.
    """

    correlation_id: str = ""
    serial: int = field(default_factory=itertools.count(1).__next__)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.monotonic)
    adapter: str = ""
    num_tokens: int = 0
    streams: list[OutputStream] = field(default_factory=list)
    error: GraftError | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What the client gets back: its ids in the server's logs and lists, and who answered, as NAME@GENERATION.

        The prompts of a batch can have met different generations, if one was replaced just then: then all are named.
        """
        adapters = ",".join(sorted({stream.adapter for stream in self.streams if stream.adapter}))
        pairs = ((REQUEST_ID_KEY, self.request_id), (CORRELATION_ID_KEY, self.correlation_id), (ADAPTER_KEY, adapters))
        return tuple((key, value) for key, value in pairs if value)

    def attach(self, stream: OutputStream) -> None:
        """Join the stream of one prompt to this call; raises the error that ended the call meanwhile."""
        if self.error is not None:
            raise self.error
        self.streams.append(stream)

    def end(self, error: GraftError) -> bool:
        """End the call with this error and free what it holds; False if all of it has ended already."""
        if self.error is not None or (self.streams and all(stream.ended for stream in self.streams)):
            return False
        self.error = error
        for stream in self.streams:
            stream.end(error)
        return True


def correlation_id_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """What the client sent as `x-correlation-id`, "" if nothing; of several the last counts, as for TGIS.

    Raises InvalidRequest unless it has 1 to MAX_CORRELATION_ID_CHARS printable ASCII characters.
    """
    values = [value for key, value in metadata if key == CORRELATION_ID_KEY]
    if not values:
        return ""
    value = values[-1]
    is_fine = isinstance(value, str) and value.isascii() and value.isprintable()
    if not is_fine or not 1 <= len(value) <= MAX_CORRELATION_ID_CHARS:
        message = f"{CORRELATION_ID_KEY} must have 1 to {MAX_CORRELATION_ID_CHARS} printable ASCII characters"
        raise InvalidRequest(message, reason="CORRELATION_ID_INVALID", field=CORRELATION_ID_KEY)
    return str(value)
