"""Rows of every format, what is wrong with bad ones, over-long rows, and the evaluation split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loaders.tokenizer import Tokenizer
from runtime.trainer.config import DATA_FORMATS, DataConfig
from runtime.trainer.data import jsonl
from runtime.trainer.data.documents import DataError, Document, read_documents, split_documents
from tests.trainer.data.conftest import Read

USER, ASSISTANT = {"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the dog"}
CHAT = {"messages": [USER, ASSISTANT]}


@pytest.mark.parametrize(
    "row",
    [
        {"id": "esft-1", **CHAT},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"instruction": "the fox", "output": "the dog"},
        {"instruction": "the fox", "input": "", "output": "the dog", "history": []},
        {"conversations": [{"from": "human", "value": "the fox"}, {"from": "gpt", "value": "the dog"}]},
        {"conversations": [{"from": "user", "value": "the fox"}, {"from": "assistant", "value": "the dog"}], "id": 3},
    ],
)
def test_the_formats_of_chats_are_recognised_and_mean_the_same(read: Read, row: dict[str, Any]) -> None:
    [document], _ = read(row)
    [chat], _ = read(CHAT)
    assert document.token_ids.tolist() == chat.token_ids.tolist()
    assert document.is_target.tolist() == chat.is_target.tolist()


def test_alpaca_input_system_and_history_are_turns(read: Read) -> None:
    rich = {"system": "s", "history": [["q", "a"]], "instruction": "the fox", "input": "日本", "output": "the dog"}
    turns = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "the fox\n日本"), ("assistant", "the dog")]
    [document], _ = read(rich)
    [chat], _ = read({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert document.token_ids.tolist() == chat.token_ids.tolist()
    assert document.is_target.tolist() == chat.is_target.tolist()


def test_of_message_lists_only_the_completion_is_learnt(read: Read, tokenizer: Tokenizer) -> None:
    row = {"prompt": [USER, {"role": "assistant", "content": "quick"}, USER], "completion": [ASSISTANT]}
    [document], _ = read(row)
    learnt = document.token_ids[document.is_target].tolist()
    assert tokenizer.decode(learnt) == "the dog"
    assert learnt[-1] == 1


BAD_ROWS: list[tuple[dict[str, Any] | bytes, str]] = [
    (b'{"messages": [', "not valid JSON"),
    (b"[1, 2]", "expected a JSON object, found list"),
    (b'{"messages": 1, "messages": 2}', "key messages appears twice"),
    (b'{"text": "\xff\xfe"}', "not valid UTF-8 (byte 10 of the line"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
    ({"messages": "hello"}, "messages is a string, expected a list"),
    ({"messages": []}, "messages is an empty list"),
    ({"messages": [3]}, "messages 1 is a number, expected an object"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages 2: role is 'tool', expected one of system,"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages 2: content is null or absent"),
    ({"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages 2 has tool_calls"),
    ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "messages 2: weight is 0.5"),
    ({"messages": [USER]}, "nothing to learn: no turn of the assistant"),
    ({"messages": [USER, {"role": "system", "content": "x"}, ASSISTANT]}, "a system text stands after the first turn"),
    ({"text": "the fox"}, "no messages, which a chat row has (found: text)"),
]


def test_every_bad_row_is_named_by_file_and_line(read: Read) -> None:
    with pytest.raises(DataError) as refused:
        read(CHAT, b"", *(row for row, _ in BAD_ROWS), CHAT)
    assert str(refused.value).startswith(f"{len(BAD_ROWS)} rows of the training data cannot be used")
    assert len(refused.value.problems) == len(BAD_ROWS)
    for line, (problem, (_, reason)) in enumerate(zip(refused.value.problems, BAD_ROWS, strict=True), 3):
        assert f"rows.jsonl:{line}: " in problem
        assert reason in problem


@pytest.mark.parametrize(
    ("row", "format_name", "reason"),
    [
        ({"question": "x", "answer": "y"}, "auto", "the keys (answer, question) are those of no format (chat:"),
        ({}, "auto", "the keys (no keys) are those of no format"),
        ({"text": "x", **CHAT}, "auto", "fit the formats chat and text: set data.format"),
        ({"text": ""}, "auto", "text is empty"),
        ({"text": ["x"]}, "text", "text is a list, expected a string"),
        (CHAT, "text", "no text, which a text row has (found: messages)"),
        ({"prompt": "x", "completion": [ASSISTANT]}, "auto", "prompt is a string and completion is a list"),
        ({"prompt": "x", "completion": None}, "prompt-completion", "no completion"),
        ({"instruction": "x", "output": 3}, "auto", "output is a number, expected a string"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "auto", "history 1 is not a pair"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "auto", "turn 1: from is 'observation'"),
        ({"conversations": [{"from": "gpt"}]}, "auto", "turn 1: value is null or absent"),
    ],
)
def test_a_row_of_another_format_is_refused_with_its_reason(
    read: Read, row: dict[str, Any], format_name: str, reason: str
) -> None:
    with pytest.raises(DataError) as refused:
        read(row, format=format_name)
    assert reason in str(refused.value)


def test_a_null_column_of_another_format_does_not_matter(read: Read) -> None:
    [document], _ = read({"text": None, **CHAT})
    [chat], _ = read(CHAT)
    assert document.token_ids.tolist() == chat.token_ids.tolist()


def test_each_file_has_its_own_format(read: Read, tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat, text = tmp_path / "chat.jsonl", tmp_path / "text.jsonl"
    chat.write_bytes(b"\xef\xbb\xbf" + json.dumps(CHAT).encode())  # as some editors of Windows begin a file
    text.write_text('{"text": "the fox"}\r\n\r\n{"text": "the dog"}\r\n')
    documents, report = read_documents([chat, text], DataConfig(train=(chat, text)), tokenizer)
    assert [len(document) for document in documents[1:]] == [len(tokenizer.encode("the fox")) + 1] * 2
    assert report.num_rows == 3


def test_twenty_bad_rows_are_printed_and_the_others_counted(read: Read) -> None:
    with pytest.raises(DataError) as refused:
        read(*[{"text": 1}] * 50)
    lines = str(refused.value).splitlines()
    assert len(lines) == 22
    assert lines[-1].endswith("and 30 more problems")


def test_reading_stops_after_a_thousand_bad_rows(read: Read) -> None:
    with pytest.raises(DataError, match=r"1000 rows .*\(reading stopped after 1000\)") as refused:
        read(*[b"x"] * 1200)
    assert len(refused.value.problems) == 1000


def test_a_line_beyond_the_limit_is_named_and_the_next_one_is_read(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1 << 20)
    with pytest.raises(DataError) as refused:
        read({"text": "a"}, {"text": "a" * (3 << 20)}, {"text": 3})
    first, second = refused.value.problems
    assert first.endswith("rows.jsonl:2: the line is longer than the allowed 1 MiB")
    assert second.endswith("rows.jsonl:3: text is a number, expected a string")


KEYS = ("messages", "role", "content", "weight", "prompt", "completion", "text", "conversations", "from", "value")
ALPACA_KEYS = ("instruction", "input", "output", "history", "system")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["user", "assistant", "gpt", "\ud800", "the fox"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS + ALPACA_KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.dictionaries(st.sampled_from(KEYS + ALPACA_KEYS), VALUES, max_size=6),
    format_name=st.sampled_from(DATA_FORMATS),
)
def test_any_row_is_either_read_or_refused_by_its_line(read: Read, row: dict[str, Any], format_name: str) -> None:
    line = json.dumps(row).encode()
    try:
        [document], _ = read(line, format=format_name)
    except DataError as refused:
        assert len(refused.problems) == 1
        assert "rows.jsonl:1: " in refused.problems[0]
        str(refused).encode("utf-8")  # it can be printed
    else:
        assert document.is_target.any()


@pytest.mark.parametrize("rows", [[], [b"", b"  "]])
def test_a_file_without_rows_is_refused(read: Read, rows: list[bytes]) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: no rows"):
        read(*rows)


def test_a_file_that_is_not_there_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        read_documents([path], DataConfig(train=(path,)), tokenizer)


def test_a_row_as_long_as_allowed_is_kept_whole(read: Read) -> None:
    [document], _ = read({"text": "abcdefg"})
    [same], report = read({"text": "abcdefg"}, max_length=len(document), overlong="error")
    assert same.token_ids.tolist() == document.token_ids.tolist()
    assert report.num_truncated == report.num_dropped == 0


def test_of_an_overlong_row_the_end_is_cut_and_no_eos_is_learnt(read: Read) -> None:
    long, short = {"prompt": "Q:", "completion": "xyzxyzxyz"}, {"prompt": "Q:", "completion": "x"}
    [whole], _ = read(long)
    (cut, kept), report = read(long, short, max_length=8)
    assert cut.token_ids.tolist() == whole.token_ids[:8].tolist()
    assert cut.is_target.tolist() == whole.is_target[:8].tolist()
    assert 1 not in cut.token_ids
    assert kept.token_ids[-1] == 1
    assert (report.num_rows, report.num_truncated, report.num_dropped) == (2, 1, 0)
    assert report.num_tokens == 8 + len(kept)


def test_a_row_whose_prompt_fills_the_length_is_dropped_and_counted(read: Read) -> None:
    long, short = {"prompt": "xyzxyzxyz", "completion": "x"}, {"prompt": "Q:", "completion": "x"}
    [kept], report = read(long, short, max_length=8)
    assert (report.num_rows, report.num_truncated, report.num_dropped) == (2, 0, 1)
    assert report.num_tokens == len(kept)
    assert report.describe() == "2 rows: 1 kept (0 truncated), 1 dropped; 5 tokens, 40.0 % of them learnt"


def test_overlong_rows_are_dropped_or_refused_as_configured(read: Read) -> None:
    rows = [{"text": "xyzxyzxyz"}, {"text": "x"}, {"text": "xyzxyzxyzxyz"}]
    [kept], report = read(*rows, max_length=8, overlong="drop")
    assert len(kept) == 3
    assert (report.num_truncated, report.num_dropped) == (0, 2)
    with pytest.raises(DataError) as refused:
        read(*rows, max_length=8, overlong="error")
    first, second = refused.value.problems
    assert first.endswith("rows.jsonl:1: 11 tokens, more than data.max_length = 8")
    assert second.endswith("rows.jsonl:3: 14 tokens, more than data.max_length = 8")


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_data_of_which_nothing_is_learnt_is_refused(read: Read, overlong: str) -> None:
    with pytest.raises(DataError, match=r"no token is left to learn.*raise data\.max_length"):
        read({"prompt": "xyzxyzxyz", "completion": "x"}, max_length=8, overlong=overlong)


def numbered(count: int) -> list[Document]:
    return [Document(np.array([0, n, 1], np.int32), np.array([False, True, True])) for n in range(count)]


def test_the_split_depends_on_nothing_but_each_document() -> None:
    documents = numbered(2000)
    train, held_out = split_documents(documents, 0.1)
    assert 150 < len(held_out) < 250
    assert len(train) + len(held_out) == 2000
    chosen = {int(document.token_ids[1]) for document in held_out}
    _, reversed_half = split_documents(documents[1000::-1], 0.1)
    assert {int(document.token_ids[1]) for document in reversed_half} == {n for n in chosen if n <= 1000}
    _, twice = split_documents(documents + numbered(2000), 0.1)
    assert len(twice) == 2 * len(held_out)
    _, more = split_documents(documents, 0.2)
    assert chosen < {int(document.token_ids[1]) for document in more}


def test_a_split_that_leaves_a_side_empty_is_refused_and_none_is_asked_for_with_0() -> None:
    with pytest.raises(DataError, match=r"data\.eval_fraction = 0\.01 of 3 documents leaves none for evaluation"):
        split_documents(numbered(3), 0.01)
    with pytest.raises(DataError, match="leaves none for training"):
        split_documents(numbered(1), 0.999)
    documents = numbered(3)
    assert split_documents(documents, 0) == (documents, [])
