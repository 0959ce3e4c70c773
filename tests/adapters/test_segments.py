"""Memory that a reading process uses again: which segment serves which adapter, and how much stays vacant."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from runtime.adapters import segments
from runtime.adapters.lent_pages import LentPages
from runtime.adapters.segments import Segment, SegmentStock
from runtime.adapters.shared_arena import SharedArena
from runtime.adapters.shared_pages import map_memory, tensor_over

MIB = 2**20


@pytest.fixture
def stock() -> SegmentStock:
    return SegmentStock()


def _lent(stock: SegmentStock, num_bytes: int, expected: int | None = None) -> int:
    """Lend a segment with so many bytes of ones, as one load does; returns its number."""
    with SharedArena(stock) as arena:
        arena.expect(num_bytes if expected is None else expected)
        arena.new_pages((num_bytes,), torch.uint8).fill_(1)
        number, _ = arena.lend()
        arena.lent()
    return number


def test_a_vacant_segment_serves_an_adapter_of_about_its_size(stock: SegmentStock) -> None:
    number = _lent(stock, 4 * MIB)
    stock.vacate([number])
    with SharedArena(stock) as arena:
        arena.expect(4 * MIB - 200_000)
        arena.new_pages((1000, 1000), torch.float32)
        assert arena.lend() == (number, None)


@pytest.mark.parametrize("num_bytes", [3 * MIB, 4 * MIB + 1])
def test_a_segment_serves_none_that_leaves_much_of_it_or_does_not_fit(stock: SegmentStock, num_bytes: int) -> None:
    number = _lent(stock, 4 * MIB)
    stock.vacate([number])
    assert _lent(stock, num_bytes) != number


def test_a_lent_segment_is_never_given_to_another_adapter(stock: SegmentStock) -> None:
    assert len({_lent(stock, MIB) for _ in range(5)}) == 5


def test_an_adapter_that_takes_more_than_expected_is_whole_and_the_next_one_like_it_fits(stock: SegmentStock) -> None:
    stock.vacate([_lent(stock, MIB)])
    with SharedArena(stock) as arena:
        arena.expect(MIB)
        parts = [arena.new_pages((MIB // 2,), torch.uint8).fill_(value) for value in (1, 2, 3)]
        places = [arena.place(part) for part in parts]
        number, fd = arena.lend()
        assert fd is not None
        seen = map_memory(fd, os.fstat(fd).st_size)
        for value, place in enumerate(places, 1):
            assert tensor_over(seen, place.shape, place.offset, torch.uint8).eq(value).all()
        arena.lent()
    stock.vacate([number])
    with SharedArena(stock) as arena:
        arena.expect(MIB)
        for _ in parts:
            arena.new_pages((MIB // 2,), torch.uint8)
        assert arena.lend() == (number, None)


def test_a_new_segment_takes_what_its_adapter_takes(stock: SegmentStock) -> None:
    with SharedArena(stock) as arena:
        arena.expect(8 * MIB)
        arena.new_pages((MIB,), torch.uint8)
        _, fd = arena.lend()
        assert fd is not None and os.fstat(fd).st_size == MIB


def test_a_refused_adapter_leaves_its_segment_for_the_next_one(stock: SegmentStock) -> None:
    with pytest.raises(RuntimeError), SharedArena(stock) as arena:
        arena.expect(MIB)
        raise RuntimeError("refused")
    assert stock.num_vacant_bytes == MIB
    _lent(stock, MIB)
    assert stock.num_vacant_bytes == 0


def test_a_segment_that_grew_for_a_refused_adapter_serves_the_next_one(stock: SegmentStock) -> None:
    with pytest.raises(RuntimeError), SharedArena(stock) as arena:
        arena.expect(MIB)
        for _ in range(3):
            arena.new_pages((MIB // 2,), torch.uint8)
        raise RuntimeError("refused")
    assert stock.num_vacant_bytes == MIB * 3 // 2
    with SharedArena(stock) as arena:
        arena.expect(MIB * 3 // 2)
        page = arena.new_pages((MIB * 3 // 2,), torch.uint8).fill_(9)
        place = arena.place(page)
        _, fd = arena.lend()
        assert fd is not None
        assert tensor_over(map_memory(fd, os.fstat(fd).st_size), place.shape, place.offset, torch.uint8).eq(9).all()
        arena.lent()
    assert stock.num_vacant_bytes == 0


def test_adapters_of_one_size_do_not_get_larger_and_larger_segments(stock: SegmentStock) -> None:
    sizes = [MIB * 100 // 100, MIB * 112 // 100, MIB * 124 // 100]
    large = [_lent(stock, size) for size in reversed(sizes)]
    stock.vacate([large[1]])
    assert _lent(stock, sizes[0]) == large[1]  # 12 % more than it needs
    stock.vacate([large[0]])
    assert _lent(stock, sizes[0]) not in large


def test_memory_that_cannot_be_had_leaves_no_descriptor(stock: SegmentStock, monkeypatch: pytest.MonkeyPatch) -> None:
    _lent(stock, MIB)
    before = os.listdir("/proc/self/fd")

    def no_memory(*_: object) -> None:
        raise OSError(12, "no memory")

    monkeypatch.setattr(segments, "map_memory", no_memory)
    with pytest.raises(OSError, match="no memory"), SharedArena(stock) as arena:
        arena.expect(MIB)
    assert _exhausted(stock.preparing()) == 0
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_vacant_memory_is_bounded_and_what_goes_is_given_back_at_once(
    stock: SegmentStock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "MAX_VACANT_BYTES", 5 * MIB)
    numbers = [_lent(stock, 2 * MIB) for _ in range(4)]
    before = _shared_bytes()
    stock.vacate(numbers)
    assert stock.dropped == numbers[:2] and stock.num_vacant_bytes == 4 * MIB
    assert before - _shared_bytes() == 4 * MIB
    monkeypatch.setattr(segments, "MAX_READY_BYTES", 3 * MIB)
    stock.shrink()
    assert stock.dropped == numbers[:3] and stock.num_vacant_bytes == 2 * MIB


def test_the_last_vacant_segment_stays_however_large_it_is_and_small_ones_are_bounded_in_number(
    stock: SegmentStock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "MAX_VACANT_BYTES", MIB)
    stock.vacate([_lent(stock, 3 * MIB)])
    assert stock.num_vacant_bytes == 3 * MIB
    stock.vacate([_lent(stock, 3 * MIB), _lent(stock, MIB)])
    assert stock.num_vacant_bytes == MIB
    monkeypatch.setattr(segments, "MAX_VACANT_BYTES", 2**30)
    stock.vacate([_lent(stock, 100) for _ in range(segments.MAX_VACANT + 5)])
    assert stock.num_vacant_bytes <= segments.MAX_VACANT * os.sysconf("SC_PAGE_SIZE")


def test_one_segment_like_the_last_is_made_ready_also_when_that_is_broken_off(stock: SegmentStock) -> None:
    assert _exhausted(stock.preparing()) == 0
    _lent(stock, 4 * MIB)
    pieces = stock.preparing()
    next(pieces)
    pieces.close()
    assert stock.num_vacant_bytes == 4 * MIB
    assert _exhausted(stock.preparing()) == 0  # one is enough
    _lent(stock, 4 * MIB)
    assert _exhausted(stock.preparing()) == 4
    assert stock.num_vacant_bytes == 4 * MIB


def test_nothing_is_made_ready_for_adapters_beyond_the_bound(
    stock: SegmentStock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "MAX_READY_BYTES", MIB)
    _lent(stock, 2 * MIB)
    assert _exhausted(stock.preparing()) == 0 and stock.num_vacant_bytes == 0


def test_a_segment_that_another_process_maps_does_not_grow() -> None:
    segment = Segment(7)
    segment.grow(100)
    segment.close_file()
    with pytest.raises(ValueError, match="segment 7 is mapped by another process"):
        segment.grow(100)


def test_a_lent_segment_comes_back_once_and_is_mapped_until_it_is_forgotten(stock: SegmentStock) -> None:
    came_back: queue.SimpleQueue[Sequence[int]] = queue.SimpleQueue()
    lent = LentPages(came_back.put)
    with SharedArena(stock) as arena:
        arena.new_pages((10,), torch.uint8).fill_(5)
        number, fd = arena.lend()
        assert fd is not None
        tensors = [tensor_over(lent.take(number, os.dup(fd)), (4,), 2, torch.uint8)]
        arena.lent()
    assert tensors[0].tolist() == [5] * 4
    tensors.append(tensors[0][1:])
    del tensors[0]
    assert came_back.empty()
    tensors.clear()
    assert came_back.get(timeout=10) == [number]
    again = tensor_over(lent.take(number, None), (10,), 0, torch.uint8)
    assert again.tolist() == [5] * 10
    lent.forget([number])
    assert again.tolist() == [5] * 10
    with pytest.raises(OSError, match=f"segment {number} did not come"):
        lent.take(number, None)
    lent.close()


def _exhausted(pieces: Iterator[None]) -> int:
    return sum(1 for _ in pieces)


def _shared_bytes() -> int:
    """Shared memory that this process maps and that is there."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssShmem:")) * 1024
