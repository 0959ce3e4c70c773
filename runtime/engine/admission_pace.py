"""How fast waiting requests get their first step, and so how long the next one would wait."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 10.0
_SHORTEST_SECONDS = 0.1


class AdmissionPace:
    """Counts admissions of the last seconds, since requests began to wait: before that they only show who came."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._recent: deque[tuple[float, int]] = deque()
        self._num_recent = 0

    def update(self, now: float, num_admitted: int, num_left: int) -> None:
        """Tell of one step at monotonic time `now`: how many were admitted, and how many could still be."""
        if not num_left:
            self._since = None
            self._recent.clear()
            self._num_recent = 0
            return
        if self._since is None:
            self._since = now
        if num_admitted:
            self._recent.append((now, num_admitted))
            self._num_recent += num_admitted
        while self._recent and self._recent[0][0] < now - WINDOW_SECONDS:
            self._num_recent -= self._recent.popleft()[1]

    def wait_seconds(self, now: float, num_waiting: int) -> float:
        """`num_waiting` by the admissions per second; if none was admitted, as long as that has lasted already."""
        if not num_waiting or self._since is None:
            return 0.0
        if not self._num_recent:
            return now - self._since
        seconds = min(max(now - self._since, _SHORTEST_SECONDS), WINDOW_SECONDS)
        return num_waiting * seconds / self._num_recent
