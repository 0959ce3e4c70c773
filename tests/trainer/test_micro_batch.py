"""Where each document of a micro-batch lies, for any lengths."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.ops import reference
from runtime.trainer.micro_batch import bucket_documents
from tests.trainer.stages import CPU, ROW_TOKENS, make_batch, make_rows

LENGTHS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=4)


@given(lengths=LENGTHS, extra=st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_each_token_comes_back_to_its_place_from_a_bucket_of_its_document(
    lengths: list[list[int]], extra: int
) -> None:
    width = max(map(sum, lengths)) + extra
    documents = bucket_documents(lengths, width, CPU)
    place_T = torch.arange(len(lengths) * width)
    rows = [place_T if bucket.rows_N is None else bucket.rows_N for bucket in documents.buckets]
    for bucket, rows_N in zip(documents.buckets, rows, strict=True):
        assert len(rows_N) == bucket.num_documents * bucket.num_tokens
    joined = torch.cat(rows)
    back = joined if documents.slot_T is None else joined[documents.slot_T]
    in_bucket = [
        (row[0].item(), place)
        for bucket, rows_N in zip(documents.buckets, rows, strict=True)
        for row in rows_N.view(bucket.num_documents, -1)
        for place in range(bucket.num_tokens)
    ]
    num_seen = 0
    for index, row in enumerate(lengths):
        start = index * width
        for length in row:
            for offset in range(length):
                token = start + offset
                assert back[token] == token
                slot = token if documents.slot_T is None else int(documents.slot_T[token])
                assert in_bucket[slot] == (start, offset)
            start += length
            num_seen += 1
    assert sum(bucket.num_documents for bucket in documents.buckets) == num_seen


@given(lengths=LENGTHS)
@settings(max_examples=30, deadline=None)
def test_attention_over_buckets_is_attention_over_each_document(lengths: list[list[int]]) -> None:
    width = max(map(sum, lengths)) + 3
    documents = bucket_documents(lengths, width, CPU)
    x = torch.randn(len(lengths) * width, 4, generator=torch.Generator().manual_seed(0))
    outputs = []
    for bucket in documents.buckets:
        part = x if bucket.rows_N is None else x[bucket.rows_N]
        part = part.view(bucket.num_documents, 1, bucket.num_tokens, 4)
        outputs.append(reference.attention(part, part, part, 1.0).flatten(0, 2))
    joined = torch.cat(outputs)
    seen = joined if documents.slot_T is None else joined[documents.slot_T]
    for index, row in enumerate(lengths):
        start = index * width
        for length in row:
            own = x[start : start + length][None, None]
            expected = reference.attention(own, own, own, 1.0)[0, 0]
            torch.testing.assert_close(seen[start : start + length], expected, atol=1e-5, rtol=1e-5)
            start += length


def test_buckets_hold_at_most_twice_the_tokens_and_sixteen_for_each_document() -> None:
    lengths = [[1, 3, 17, 40, 64, 65, 200], [390]]
    documents = bucket_documents(lengths, 390, CPU)
    for bucket in documents.buckets:
        assert bucket.rows_N is not None
        for row in bucket.rows_N.view(bucket.num_documents, -1):
            assert len(row) <= max(16, 2 * len(row.unique()))


def test_rows_without_padding_need_no_index() -> None:
    documents = bucket_documents([[24], [24]], 24, CPU)
    assert documents.slot_T is None
    assert [(b.num_documents, b.num_tokens, b.rows_N) for b in documents.buckets] == [(2, 24, None)]


def test_places_in_the_run_padding_and_weights_follow_from_the_step() -> None:
    rows = make_rows(((5, 3), (9,), (4,)), seed=2)
    batch = make_batch(rows[1:], of=rows, first_row=1)
    assert batch.width == 16
    assert batch.num_rows == 2
    assert batch.ids_T.tolist() == [*range(ROW_TOKENS, ROW_TOKENS + 16), *range(2 * ROW_TOKENS, 2 * ROW_TOKENS + 16)]
    assert batch.is_real_T.tolist() == [True] * 9 + [False] * 7 + [True] * 4 + [False] * 12
    num_targets = sum(int(document.is_target[1:].sum()) for row in rows for document in row)
    assert (batch.loss_weight, batch.row_weight) == (1 / num_targets, 1 / 3)
