"""What the client saw of one request. All times are readings of one monotonic clock, in seconds."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from google.rpc import error_details_pb2
from grpc_status import rpc_status

from runtime.pb.fmaas import generation_pb2 as pb


class RequestError(NamedTuple):
    """How a request failed: gRPC's code, the reason that the server gave (or ""), and its sentence."""

    code: str
    reason: str
    message: str

    @classmethod
    def from_call(cls, error: Any) -> RequestError:
        """From the error of a gRPC call."""
        status = rpc_status.from_call(error)
        info = error_details_pb2.ErrorInfo()
        for detail in status.details if status is not None else ():
            if detail.Unpack(info):
                break
        return cls(error.code().name, info.reason, error.details() or "")


@dataclass
class RequestRecord:
    """`arrived` is when it was due: by the schedule in an open loop, when it was sent in a closed one.

    `times` and `counts` have an entry for each message that brought tokens: when, and how many had come by then.
    """

    adapter: str
    arrived: float
    sent: float = 0.0
    ended: float = 0.0
    prompt_tokens: int = 0
    times: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("l"))
    stop_reason: str = ""
    error: RequestError | None = None

    def take(self, response: pb.GenerationResponse, now: float) -> None:
        """A message has come."""
        if response.input_token_count:
            self.prompt_tokens = response.input_token_count
        if response.generated_token_count > self.output_tokens:
            self.times.append(now)
            self.counts.append(response.generated_token_count)
        if response.stop_reason != pb.NOT_FINISHED:
            self.stop_reason = pb.StopReason.Name(response.stop_reason)

    def finish(self, now: float, error: RequestError | None = None) -> None:
        """The stream has ended; one that ended without a stop reason has failed."""
        self.ended = now
        self.error = error
        if error is None and not self.stop_reason:
            self.error = RequestError("INCOMPLETE", "", "the stream ended without a stop reason")

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return self.counts[-1] if self.counts else 0

    @property
    def queue_seconds(self) -> float:
        """From when it was due until it was sent."""
        return self.sent - self.arrived

    @property
    def ttft_seconds(self) -> float | None:
        """From when it was due to the first message with a token; None if no token came."""
        return self.times[0] - self.arrived if self.times else None

    @property
    def e2e_seconds(self) -> float:
        """From when it was due to its end."""
        return self.ended - self.arrived

    @property
    def gaps_seconds(self) -> list[float]:
        """Between each two messages with tokens."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def tpot_seconds(self) -> float | None:
        """Seconds for each token after those of the first message; None without any."""
        num_later = self.counts[-1] - self.counts[0] if self.counts else 0
        return (self.times[-1] - self.times[0]) / num_later if num_later else None
