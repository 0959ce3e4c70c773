"""What happened in a run: what was asked, what came back, and when. Times are of one monotonic clock, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

# Marks of an adapter by channel, see benchmarks/marked_model.py; {} for what has no mark of its own.
Marks = dict[int, int]


@dataclass
class Request:
    """One prompt of a call. `adapter` is as it was sent, "" for the base; `answered_by` is the trailer `graft-adapter`.

    `first` is when the first token came, where the client could tell; a client that `paused` then read nothing for a
    while. `code` and `reason` are those of the status.
    """

    adapter: str
    last_token: int
    max_new_tokens: int
    sent: float
    ended: float = 0.0
    first: float | None = None
    tokens: list[int] = field(default_factory=list)
    stop: str = ""
    code: str = "OK"
    reason: str = ""
    details: str = ""
    answered_by: str = ""
    cancelled: bool = False
    paused: bool = False
    deadline_seconds: float | None = None
    time_limit_seconds: float | None = None

    @property
    def begun_by(self) -> float:
        """When the engine had taken it at the latest."""
        return self.ended if self.first is None else self.first


@dataclass
class Operation:
    """One call of an operator.

    `kind` is "load" (and compose), "unload", "alias" or "unalias". `generation` is the one answered, 0 if none, and
    `marks` are those of what was to be loaded. A `name` of an alias stands for `target` from then on.
    """

    kind: str
    name: str
    called: float
    returned: float = 0.0
    generation: int = 0
    marks: Marks = field(default_factory=dict)
    target: str = ""
    force: bool = False
    replaced: bool = False
    code: str = "OK"
    reason: str = ""


@dataclass
class Change:
    """What WatchAdapters told, and when it was read."""

    seen: float
    name: str
    generation: int
    state: str


@dataclass
class History:
    """A whole run. Requests register the names of `on_demand`, here with their marks; `broken` of them are refused."""

    requests: list[Request] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    on_demand: dict[str, Marks] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    max_adapter_wait_seconds: float = 60.0
    max_wait_seconds: float = 60.0
