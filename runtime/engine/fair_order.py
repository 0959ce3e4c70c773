"""Who of the waiting sequences begins next: adapters take turns, and nobody waits for ever.

Sequences that have begun before (they were preempted) come first, as they stand in the queue. Of the others, a place
goes to the adapter that has the fewest sequences running, among equals to the one whose last place was given longest
ago, and in an adapter to the oldest; but every fourth place goes to whoever stands at the head of the queue, whatever
its adapter. So the only request of an adapter gets one of the next two places though a thousand of one other wait
before it, one with n older requests before it gets one of the next 4 (n + 1) whatever the others do, and if there is
one adapter only, the order is that of the queue.

The base counts as one adapter, all generations of a name as one, and so do all weighted sums of the same names:
clients choose the weights, and would have a new share with each.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from runtime.engine.sequence import Sequence

PLACES_PER_ROUND = 4
MAX_REMEMBERED_SHARES = 1024

Share: TypeAlias = tuple[str, ...]


class FairOrder:
    """Remembers between steps whose turn it is."""

    def __init__(self) -> None:
        self._num_given = 0
        self._last_place: OrderedDict[Share, int] = OrderedDict()  # the oldest first

    def order(self, waiting: Iterable[Sequence], running: Iterable[Sequence]) -> Iterator[Sequence]:
        """Of `waiting`, oldest first, who is to begin next, and who after it has been given a place."""
        queues: dict[Share, deque[tuple[int, Sequence]]] = {}
        for place, sequence in enumerate(waiting):
            if sequence.has_begun:
                yield sequence
            else:
                queues.setdefault(share_of(sequence), deque()).append((place, sequence))
        num_running = Counter(map(share_of, running))
        while queues:
            is_turn_of_oldest = self._num_given % PLACES_PER_ROUND == PLACES_PER_ROUND - 1
            heads = {share: queue[0][0] for share, queue in queues.items()}
            ranks = {share: (num_running[share], self._last_place.get(share, -1), heads[share]) for share in heads}
            share = min(heads, key=heads.__getitem__) if is_turn_of_oldest else min(ranks, key=ranks.__getitem__)
            yield queues[share].popleft()[1]
            num_running[share] += 1
            if not queues[share]:
                del queues[share]

    def give(self, sequence: Sequence) -> None:
        """This one begins now."""
        if sequence.has_begun:
            return
        share = share_of(sequence)
        self._last_place[share] = self._num_given
        self._last_place.move_to_end(share)
        if len(self._last_place) > MAX_REMEMBERED_SHARES:
            self._last_place.popitem(last=False)
        self._num_given += 1


def share_of(sequence: Sequence) -> Share:
    """For whom it counts: nobody (the base), the adapter's name, or the names of what requests have summed up."""
    adapter = sequence.adapter
    if adapter is None:
        return ()
    if not adapter.derived:
        return (adapter.name,)
    return tuple(sorted({part.record.name for part in adapter.parts}))
