"""Which sequences run: order, chunks, preemption, seats, and blocks that always come back."""

from __future__ import annotations

from runtime.adapters.info import AdapterState
from runtime.adapters.record import AdapterRecord
from runtime.engine.batch import Batch
from runtime.engine.guides.guide import Guide
from runtime.engine.kv_cache import BlockPool
from runtime.engine.messages import AddRequest, FinishReason, RequestId
from runtime.engine.sampling_params import GuideKind, GuideSpec, SamplingParams
from runtime.engine.scheduler import Scheduler, SchedulerLimits
from runtime.engine.sequence import Sequence

EOS = 1


def _scheduler(*, tokens: int = 16, size: int = 4, blocks: int = 64, longest: int = 100) -> Scheduler:
    return Scheduler(SchedulerLimits(tokens, size, longest, frozenset({EOS})), BlockPool(blocks, 4))


def _add(scheduler: Scheduler, request: int, length: int, *, slot: int | None = None, new: int = 5) -> Sequence:
    adapter = None
    if slot is not None:
        adapter = AdapterRecord(f"a{slot}", 1, "", state=AdapterState.READY, slot=slot, is_resident=True)
    params = SamplingParams(max_new_tokens=new)
    sequence = Sequence.from_request(AddRequest(RequestId(request), [9] * length, params), adapter)
    scheduler.add(sequence)
    return sequence


def _schedule(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule()
    assert batch is not None
    return batch


def _run(scheduler: Scheduler, token: int = 8) -> Batch:
    batch = _schedule(scheduler)
    scheduler.update(batch, [token] * sum(chunk.samples for chunk in batch.chunks))
    return batch


def test_a_long_prompt_runs_in_chunks_and_samples_once_at_its_end() -> None:
    scheduler = _scheduler(tokens=16)
    _add(scheduler, 1, 40)
    batches = [_run(scheduler) for _ in range(3)]
    assert [len(batch.chunks[0].token_ids) for batch in batches] == [16, 16, 8]
    assert [batch.chunks[0].start for batch in batches] == [0, 16, 32]
    assert [batch.chunks[0].samples for batch in batches] == [False, False, True]


def test_decodes_come_before_prefill_chunks() -> None:
    scheduler = _scheduler(tokens=8)
    first = _add(scheduler, 1, 4)
    _run(scheduler)
    _add(scheduler, 2, 30)
    batch = _schedule(scheduler)
    by_request = {chunk.request_id: len(chunk.token_ids) for chunk in batch.chunks}
    assert by_request == {first.request_id: 1, RequestId(2): 7}


def test_the_batch_is_ordered_by_adapter_with_the_base_first() -> None:
    scheduler = _scheduler(tokens=64, size=8)
    for request, slot in enumerate((3, None, 0, 3, None, 1)):
        _add(scheduler, request, 3, slot=slot)
    assert [chunk.slot for chunk in _schedule(scheduler).chunks] == [-1, -1, 0, 1, 3, 3]


def test_the_youngest_sequence_is_preempted_and_recomputes_all_its_tokens() -> None:
    scheduler = _scheduler(tokens=64, blocks=5)
    old, young = _add(scheduler, 1, 8, new=9), _add(scheduler, 2, 8, new=9)
    _run(scheduler)
    generated = 1
    while not scheduler.num_preemptions:
        _run(scheduler)
        generated += 1
    assert young in scheduler.waiting and not young.blocks and young.num_computed == 0
    assert old.num_generated == generated
    tokens_before = list(young.token_ids)
    while young not in scheduler.running:
        batch = _run(scheduler)
    chunk = next(chunk for chunk in batch.chunks if chunk.request_id == young.request_id)
    assert chunk.token_ids == tokens_before and chunk.start == 0


def test_a_sequence_whose_adapter_loads_is_passed_by() -> None:
    scheduler = _scheduler()
    loading = _add(scheduler, 1, 3, slot=0)
    assert loading.adapter is not None
    loading.adapter.is_resident = False
    _add(scheduler, 2, 3)
    assert [chunk.request_id for chunk in _run(scheduler).chunks] == [2]
    loading.adapter.is_resident = True
    assert RequestId(1) in [chunk.request_id for chunk in _run(scheduler).chunks]


def test_no_more_sequences_run_than_there_are_seats() -> None:
    scheduler = _scheduler(tokens=64, size=2)
    for request in range(4):
        _add(scheduler, request, 3)
    assert len(_run(scheduler).chunks) == 2
    assert len(scheduler.waiting) == 2


def test_an_older_request_is_not_overtaken_for_lack_of_blocks() -> None:
    scheduler = _scheduler(tokens=64, blocks=6)
    _add(scheduler, 1, 12)
    _run(scheduler)
    _add(scheduler, 2, 20)
    _add(scheduler, 3, 2)
    assert [chunk.request_id for chunk in _run(scheduler).chunks] == [1]


def test_sequences_end_for_each_reason_and_give_their_blocks_back() -> None:
    scheduler = _scheduler(tokens=64, longest=12)
    by_length = _add(scheduler, 1, 4, new=2)
    by_context = _add(scheduler, 2, 10, new=50)
    reasons: dict[Sequence, FinishReason | None] = {}
    for _ in range(2):
        batch = _schedule(scheduler)
        reasons |= dict(scheduler.update(batch, [8] * len(batch.chunks)))
    by_eos = _add(scheduler, 3, 4, new=50)
    reasons |= dict(scheduler.update(_schedule(scheduler), [EOS]))
    assert reasons == {
        by_length: FinishReason.MAX_NEW_TOKENS, by_context: FinishReason.CONTEXT_FULL, by_eos: FinishReason.EOS,
    }  # fmt: skip
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert not scheduler.sequences() and not scheduler.can_run()


def test_paused_sequences_are_passed_over_in_every_stage() -> None:
    scheduler = _scheduler(tokens=16)
    decoding, prefilling, waiting = _add(scheduler, 1, 4), _add(scheduler, 2, 40), _add(scheduler, 3, 4)
    _run(scheduler)
    for sequence in (decoding, prefilling, waiting):
        scheduler.pause(sequence, paused=True)
    assert scheduler.running == [decoding, prefilling] and list(scheduler.waiting) == [waiting]
    assert not scheduler.can_run() and not scheduler.is_running and scheduler.schedule() is None
    held = [list(sequence.blocks) for sequence in (decoding, prefilling)]
    scheduler.pause(prefilling, paused=False)
    assert [chunk.request_id for chunk in _run(scheduler).chunks] == [2]
    scheduler.pause(waiting, paused=False)
    scheduler.pause(decoding, paused=False)
    batch = _schedule(scheduler)
    assert {chunk.request_id: chunk.start for chunk in batch.chunks} == {1: 4, 2: 28, 3: 0}
    assert [decoding.blocks[:1], prefilling.blocks] == held


def test_a_paused_sequence_is_preempted_before_younger_ones() -> None:
    scheduler = _scheduler(tokens=64, blocks=6)
    old, stalled, young = (_add(scheduler, request, 7, new=20) for request in (1, 2, 3))
    _run(scheduler)
    scheduler.pause(stalled, paused=True)
    while not scheduler.num_preemptions:
        _run(scheduler)
    assert scheduler.num_preemptions == 1
    assert scheduler.running == [old, young] and list(scheduler.waiting) == [stalled]
    _run(scheduler)
    assert scheduler.can_run() and list(scheduler.waiting) == [stalled]


def test_blocks_of_paused_sequences_go_to_waiting_ones_only_if_they_suffice() -> None:
    scheduler = _scheduler(tokens=64, blocks=8)
    running, stalled = _add(scheduler, 1, 8, new=20), _add(scheduler, 2, 16)
    _run(scheduler)
    scheduler.pause(stalled, paused=True)
    too_large = _add(scheduler, 3, 28)
    _run(scheduler)
    assert scheduler.running == [running, stalled] and not scheduler.num_preemptions
    scheduler.remove(too_large)
    fitting = _add(scheduler, 4, 20)
    _run(scheduler)
    assert scheduler.running == [running, fitting] and list(scheduler.waiting) == [stalled]


def test_paused_sequences_take_no_seat_and_more_than_the_seats_never_run() -> None:
    scheduler = _scheduler(tokens=64, size=2)
    first, second = _add(scheduler, 1, 3), _add(scheduler, 2, 3)
    _run(scheduler)
    scheduler.pause(first, paused=True)
    _add(scheduler, 3, 3)
    _add(scheduler, 4, 3)
    assert [chunk.request_id for chunk in _run(scheduler).chunks] == [2, 3]
    scheduler.pause(first, paused=False)
    assert [chunk.request_id for chunk in _run(scheduler).chunks] == [1, 2]
    assert second in scheduler.running and len(scheduler.running) == 3


def test_prompt_targets_cover_each_token_once_in_chunks_and_after_preemption() -> None:
    scheduler = _scheduler(tokens=8)
    params = SamplingParams(max_new_tokens=3, score_prompt=True, num_top_tokens=2)
    prompt = list(range(100, 120))
    sequence = Sequence.from_request(AddRequest(RequestId(1), prompt, params), None)
    scheduler.add(sequence)
    scored: list[int] = []
    for step in range(7):
        chunk = _schedule(scheduler).chunks[0]
        if chunk.targets is not None:
            first = chunk.start + chunk.targets.first_row + 1
            assert prompt[first : first + len(chunk.targets.token_ids)] == chunk.targets.token_ids
            assert chunk.targets.num_top_tokens == 2
            scored += chunk.targets.token_ids
        scheduler.update(Batch([chunk]), [8] * chunk.samples)
        if step == 1:
            scheduler._preempt(sequence)
    assert scored == prompt[1:]
    assert not scheduler.sequences()


def test_the_wait_is_estimated_from_those_who_only_lack_a_seat() -> None:
    scheduler = _scheduler(tokens=64, size=1)
    assert scheduler.estimated_wait_seconds() == 0
    loading, paused = _add(scheduler, 1, 3, slot=0), _add(scheduler, 2, 3)
    scheduler.remove(loading)
    assert loading.adapter is not None
    loading.adapter.is_resident = False
    scheduler.add(loading)
    scheduler.pause(paused, paused=True)
    _add(scheduler, 3, 3)
    _run(scheduler)
    assert len(scheduler.waiting) == 2 and scheduler.estimated_wait_seconds() == 0
    scheduler.pause(paused, paused=False)
    _run(scheduler)
    assert scheduler.estimated_wait_seconds() > 0
    loading.adapter.is_resident = True
    scheduler.settle_awaiting()


def test_a_guided_sequence_is_passed_by_while_its_guide_is_not_due() -> None:
    scheduler = _scheduler()
    guided = _add(scheduler, 1, 3)
    guided.guide = Guide(1, RequestId(1), GuideSpec(GuideKind.REGEX, "a"))
    assert not scheduler.can_run() and scheduler.schedule() is None
    guided.guide.allow(b"\xff")
    assert [chunk.request_id for chunk in _run(scheduler).chunks] == [1]
    guided.guide.ask(0.0)
    assert [chunk.request_id for chunk in _run(scheduler).chunks] == [1]
    guided.guide.ask(1.0)
    guided.guide.is_slow = True
    _add(scheduler, 2, 3)
    assert [chunk.request_id for chunk in _run(scheduler).chunks] == [2]
    assert guided in scheduler.running


def test_a_row_that_gave_no_token_is_computed_again_from_its_last_token() -> None:
    scheduler = _scheduler(tokens=8)
    sequences = [_add(scheduler, 1, 6), _add(scheduler, 2, 2)]
    batch = _schedule(scheduler)
    scheduler.update(batch.sampling_only({RequestId(2)}), [8])
    assert [sequence.num_generated for sequence in sequences] == [0, 1]
    chunk = next(chunk for chunk in _run(scheduler).chunks if chunk.request_id == RequestId(1))
    assert chunk.token_ids == [9] and chunk.start == 5 and chunk.samples
    decode = _schedule(scheduler)
    scheduler.update(decode.sampling_only(set()), [])
    assert [chunk.token_ids for chunk in _schedule(scheduler).chunks] == [chunk.token_ids for chunk in decode.chunks]
