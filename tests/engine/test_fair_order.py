"""Whose turn it is: adapters share the places, one adapter alone keeps its order, and nobody waits for ever."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.adapters.info import AdapterState
from runtime.adapters.record import AdapterRecord, Part
from runtime.engine.fair_order import PLACES_PER_ROUND, share_of
from runtime.engine.guides.guide import Guide
from runtime.engine.kv_cache import BlockPool
from runtime.engine.messages import AddRequest, RequestId
from runtime.engine.sampling_params import GuideKind, GuideSpec, SamplingParams
from runtime.engine.scheduler import Scheduler, SchedulerLimits
from runtime.engine.sequence import Sequence

BLOCK_TOKENS = 4


def _scheduler(*, size: int = 4, blocks: int = 1000, tokens: int = 1000) -> Scheduler:
    return Scheduler(SchedulerLimits(tokens, size, 400, frozenset({1})), BlockPool(blocks, BLOCK_TOKENS))


def _adapter(name: str, generation: int = 1) -> AdapterRecord:
    return AdapterRecord(name, generation, "", state=AdapterState.READY, slot=0, is_resident=True)


def _add(
    scheduler: Scheduler, request: int, adapter: AdapterRecord | None = None, *, length: int = 1, new: int = 1
) -> Sequence:
    params = SamplingParams(max_new_tokens=new)
    sequence = Sequence.from_request(AddRequest(RequestId(request), [9] * length, params), adapter)
    scheduler.add(sequence)
    return sequence


def _step(scheduler: Scheduler) -> list[RequestId]:
    """Run one step; returns the requests that began in it, in the order in which they did."""
    before = set(scheduler.waiting)
    batch = scheduler.schedule()
    if batch is None:
        return []
    began = [sequence.request_id for sequence in scheduler.running if sequence in before]
    scheduler.update(batch, [8] * sum(chunk.samples for chunk in batch.chunks))
    return began


def test_one_request_does_not_wait_for_a_thousand_of_another_adapter() -> None:
    scheduler = _scheduler(size=2)
    flooding, other = _adapter("flooding"), _adapter("other")
    for request in range(1000):
        _add(scheduler, request, flooding, new=3)
    began: list[RequestId] = []
    for step in range(6):
        if step == 3:
            late = _add(scheduler, 5000, other, new=3)
        began += _step(scheduler)
        if step == 3:
            assert late.request_id in began[-2:]
    assert len(scheduler.waiting) >= 990


def test_the_base_is_not_held_up_by_an_adapter_nor_holds_one_up() -> None:
    for first, second in ((None, _adapter("a")), (_adapter("a"), None)):
        scheduler = _scheduler(size=1)
        for request in range(50):
            _add(scheduler, request, first)
        _add(scheduler, 99, second)
        began = [request for _ in range(2) for request in _step(scheduler)]
        assert RequestId(99) in began


def test_requests_of_one_adapter_begin_in_the_order_in_which_they_came() -> None:
    scheduler = _scheduler(size=3)
    for request in range(40):
        _add(scheduler, request, _adapter("a", generation=1 + request % 2), length=1 + request % 7)
    began: list[RequestId] = []
    while scheduler.can_run():
        began += _step(scheduler)
    assert began == list(range(40))


def test_adapters_that_flood_share_the_places_equally() -> None:
    scheduler = _scheduler(size=12)
    for request in range(90):
        _add(scheduler, request, _adapter("abc"[request // 30]), new=50)
    _step(scheduler)
    counts = Counter(share_of(sequence) for sequence in scheduler.running)
    # Every fourth place went to the head of the queue, which was the first adapter's.
    assert sum(counts.values()) == 12 and max(counts.values()) - min(counts.values()) <= 2


def test_sums_of_the_same_adapters_are_one_share_whatever_their_weights() -> None:
    parts = [_adapter("a"), _adapter("b", generation=2)]
    sums = []
    for weight in ("0.5", "0.6"):
        record = _adapter(f"{weight}*a@1+b@2")
        record.parts = tuple(Part(Decimal(weight), part) for part in parts)
        record.derived = True
        sums.append(record)
    scheduler = _scheduler()
    shares = {share_of(_add(scheduler, request, record)) for request, record in enumerate(sums)}
    assert shares == {("a", "b")}
    assert share_of(_add(scheduler, 7, parts[0])) == ("a",) and share_of(_add(scheduler, 8)) == ()


def test_a_preempted_sequence_begins_again_before_anyone_else() -> None:
    scheduler = _scheduler(size=3, blocks=8)
    old, young = (_add(scheduler, n, _adapter("a"), length=12, new=30) for n in (1, 2))
    while not scheduler.num_preemptions:
        _step(scheduler)
    for request in range(10, 14):
        _add(scheduler, request, _adapter("b"))
    assert young in scheduler.waiting
    scheduler.remove(old)
    assert _step(scheduler)[0] == young.request_id


Arrivals = st.lists(
    st.lists(st.tuples(st.sampled_from("aaaaaabcd"), st.integers(1, 40), st.integers(1, 12)), max_size=6), max_size=40
)


@given(arrivals=Arrivals, size=st.integers(1, 4), blocks=st.integers(14, 40))
@settings(deadline=None, max_examples=60)
def test_nobody_waits_for_ever_whatever_comes(
    arrivals: list[list[tuple[str, int, int]]], size: int, blocks: int
) -> None:
    """Each request gets a place after no more than four for each that was there before it, and for itself."""
    scheduler = _scheduler(size=size, blocks=blocks)
    adapters = {name: _adapter(name) for name in "abcd"}
    bound: dict[RequestId, int] = {}
    num_given = 0
    steps = iter(arrivals)
    for _ in range(20_000):
        for name, length, new in next(steps, []):
            sequence = _add(scheduler, len(bound), adapters[name], length=length, new=new)
            bound[sequence.request_id] = num_given + PLACES_PER_ROUND * len(scheduler.waiting)
        fresh = {sequence.request_id for sequence in scheduler.waiting if not sequence.has_begun}
        for request_id in _step(scheduler):
            if request_id in fresh:
                num_given += 1
                assert num_given <= bound[request_id]
        if not scheduler.sequences() and len(bound) == sum(map(len, arrivals)):
            break
    assert not scheduler.sequences()
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def _slow_guide(request: int) -> Guide:
    guide = Guide(request, RequestId(request), GuideSpec(GuideKind.REGEX, "a"))
    guide.ask(0.0)
    guide.is_slow = True
    return guide


def test_nothing_can_run_while_all_seats_are_held_by_sequences_that_wait_for_their_guides() -> None:
    scheduler = _scheduler(size=2)
    guided = [_add(scheduler, request, new=9) for request in range(2)]
    _step(scheduler)
    for sequence in guided:
        sequence.guide = _slow_guide(sequence.request_id)
    _add(scheduler, 5)
    assert not scheduler.can_run() and scheduler.schedule() is None
    assert guided[0].guide is not None
    guided[0].guide.allow(b"\xff")
    assert scheduler.can_run() and scheduler.schedule() is not None


def test_nothing_can_run_while_a_sequence_that_waits_for_its_guide_holds_the_blocks() -> None:
    scheduler = _scheduler(size=2, blocks=4)
    guided = _add(scheduler, 1, length=10, new=5)
    _step(scheduler)
    guided.guide = _slow_guide(1)
    waiting = _add(scheduler, 2, length=8)
    assert not scheduler.can_run() and scheduler.schedule() is None
    scheduler.pause(guided, paused=True)
    assert scheduler.can_run() and _step(scheduler) == [waiting.request_id]


@given(
    states=st.lists(st.sampled_from(["runs", "paused", "slow", "waits", "waits_slow", "loads"]), max_size=8),
    size=st.integers(1, 4),
    blocks=st.integers(3, 12),
)
@settings(deadline=None, max_examples=150)
def test_what_can_run_is_what_a_step_computes(states: list[str], size: int, blocks: int) -> None:
    """Otherwise the engine would step in circles, or sleep though there is something to do."""
    scheduler = _scheduler(size=size, blocks=blocks)
    begun = [
        _add(scheduler, n, new=40, length=3) for n, state in enumerate(states) if state in ("runs", "paused", "slow")
    ]
    _step(scheduler)
    for sequence, state in zip(begun, [s for s in states if s in ("runs", "paused", "slow")], strict=True):
        if state == "slow":
            sequence.guide = _slow_guide(sequence.request_id)
        scheduler.pause(sequence, paused=state == "paused")
    for n, state in enumerate(states, start=100):
        if state.startswith("waits") or state == "loads":
            sequence = _add(scheduler, n, _adapter("a"), length=9)
            sequence.guide = _slow_guide(n) if state == "waits_slow" else None
            if state == "loads" and sequence.adapter is not None:
                sequence.adapter.is_resident = False
    expected = scheduler.can_run()
    assert (scheduler.schedule() is not None) == expected
