"""Text at its edges, over the wire: characters split over tokens, overlapping stops, prompts that are hardly any."""

from __future__ import annotations

import grpc
import pytest

from loaders.tokenizer import IncrementalDetokenizer, Tokenizer
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.server.text import TextStream
from tests.oracle.small_tokenizers import save_byte_level, save_sentence_pieces
from tests.server.live import DEMO_MODEL, LiveServer, refused

MAX_MODEL_LEN = 256  # of the fake engine
EDGES = ["🙂", "世界，你好", "👩‍👩‍👧‍👦 family", "é e\u0301", "🇫🇷🇯🇵",
         "naïve 𝕏 \U0001f9ff", "a\u200bb", "\r\n\t end", "\ufeffBOM"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(DEMO_MODEL)


@pytest.mark.parametrize("text", EDGES)
def test_characters_that_are_split_over_tokens_come_out_whole(
    server: LiveServer, tokenizer: Tokenizer, text: str
) -> None:
    """The engine echoes the prompt; each message holds whole characters only."""
    parts = [response.text for response in server.stream(text, stopping={"max_new_tokens": 100})]
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)
    assert server.generate(text, stopping={"max_new_tokens": 100}).text == text


def test_the_edges_are_split_by_the_tokenizer(tokenizer: Tokenizer) -> None:
    """Guards the test above: most of these characters have no token of their own."""
    assert sum(len(tokenizer.encode(text)) > len(text) + 1 for text in EDGES) >= 4


def test_a_text_that_is_cut_inside_a_character_ends_with_the_replacement_mark(
    server: LiveServer, tokenizer: Tokenizer
) -> None:
    cut = server.generate("🙂", stopping={"max_new_tokens": 1})
    assert len(tokenizer.encode("🙂")) > 2
    assert (cut.text, cut.stop_reason) == ("\ufffd", pb.MAX_TOKENS)


@pytest.mark.parametrize(
    ("stops", "include", "text", "met"),
    [
        (["界，", "，你"], False, "世", "界，"),
        (["，你", "界，你"], False, "世", "界，你"),
        (["你好吗", "你好"], True, "世界，你好", "你好"),
        (["好", "你好"], False, "世界，", "你好"),
        (["世"], False, "", "世"),
        (["世界，你好"], True, "世界，你好", "世界，你好"),
    ],
)
def test_stop_sequences_that_overlap_and_span_characters(
    server: LiveServer, stops: list[str], include: bool, text: str, met: str
) -> None:
    stopping = {"max_new_tokens": 100, "stop_sequences": stops, "include_stop_sequence": include}
    whole = server.generate("世界，你好", stopping=stopping)
    assert (whole.text, whole.stop_reason, whole.stop_sequence) == (text, pb.STOP_SEQUENCE, met)
    parts = list(server.stream("世界，你好", stopping=stopping))
    assert "".join(part.text for part in parts) == text
    assert (parts[-1].stop_reason, parts[-1].stop_sequence) == (pb.STOP_SEQUENCE, met)


@pytest.mark.parametrize("save", [save_byte_level, save_sentence_pieces], ids=["byte level", "byte fallback"])
@pytest.mark.parametrize("stop", ["é", "🙂", "b🙂", "\ufffd"])
def test_a_stop_sequence_made_of_byte_tokens_is_found(tmp_path, save, stop: str) -> None:
    tokenizer = Tokenizer.from_dir(save(tmp_path))
    backend = tokenizer.backend
    backend.post_processor = None
    ids = backend.encode("ab🙂éb", add_special_tokens=False).ids
    stream = TextStream(IncrementalDetokenizer(tokenizer), [stop], include_stop=False)
    text, met = "", None
    for token_id in ids:
        update = stream.push(token_id)
        text += update.text
        if (met := update.stop_sequence) is not None:
            break
    else:
        text += stream.finish().text
    whole = tokenizer.decode(ids)
    expected = whole.split(stop)[0] if stop in whole else whole
    assert (text, met) == (expected, stop if stop in whole else None)


def test_an_empty_prompt_is_the_begin_token_alone(server: LiveServer) -> None:
    response = server.generate("", stopping={"max_new_tokens": 3, "min_new_tokens": 3})
    assert (response.input_token_count, response.generated_token_count) == (1, 3)


def test_a_prompt_of_special_tokens_only_gives_no_text(server: LiveServer, tokenizer: Tokenizer) -> None:
    """Special tokens are counted and shown as tokens, never as text."""
    mark = tokenizer.token_piece(tokenizer.bos_token_id)
    response = server.generate(mark * 3, stopping={"max_new_tokens": 3}, response={"generated_tokens": True})
    assert response.input_token_count == 4
    assert response.text == ""
    assert [token.text for token in response.tokens] == [mark] * 3


def test_a_prompt_of_exactly_the_limit_has_room_for_one_token_and_one_more_has_none(server: LiveServer) -> None:
    text, count = _text_of(server, MAX_MODEL_LEN - 1)
    response = server.generate(text)
    assert (response.input_token_count, response.generated_token_count) == (count, 1)
    assert response.stop_reason == pb.TOKEN_LIMIT
    longer, _ = _text_of(server, MAX_MODEL_LEN)
    code, reason, field = refused(lambda: server.generate(longer))
    assert (code, reason, field) == (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG", "requests[0].text")
    cut = server.generate(longer, truncate_input_tokens=MAX_MODEL_LEN - 1)
    assert cut.input_token_count == MAX_MODEL_LEN - 1


def _text_of(server: LiveServer, num_tokens: int) -> tuple[str, int]:
    """A text of exactly so many tokens, by the server's own count."""
    text = "~" * (num_tokens - 1)
    request = pb.BatchedTokenizeRequest(requests=[pb.TokenizeRequest(text=text)])
    (response,) = server.generation.Tokenize(request).responses
    assert response.token_count == num_tokens
    return text, response.token_count


def test_tokenize_gives_the_pieces_and_places_of_every_edge(server: LiveServer, tokenizer: Tokenizer) -> None:
    request = pb.BatchedTokenizeRequest(
        requests=[pb.TokenizeRequest(text=text) for text in ["", *EDGES]], return_tokens=True, return_offsets=True
    )
    responses = server.generation.Tokenize(request).responses
    for text, response in zip(["", *EDGES], responses, strict=True):
        ids = tokenizer.encode(text)
        assert response.token_count == len(ids) == len(response.offsets)
        assert list(response.tokens) == [tokenizer.token_piece(token_id) for token_id in ids]
        assert all(0 <= place.start <= place.end <= len(text) for place in response.offsets)
        assert {n for place in response.offsets for n in range(place.start, place.end)} == set(range(len(text)))
