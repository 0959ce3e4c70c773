"""The tokenizer wrapper, and text that comes out of a stream of tokens exactly as from decoding them together."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loaders.errors import CheckpointError
from loaders.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.oracle.small_tokenizers import BOS, EOS, save_byte_level, save_sentence_pieces


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(save_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(save_sentence_pieces(tmp_path_factory.mktemp("pieces")))


def stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def test_ids_come_with_bos_and_every_end_token_of_three_files(byte_level: Tokenizer) -> None:
    assert byte_level.bos_token_id == 0
    assert byte_level.eos_token_ids == {1, 7, 9}
    ids = byte_level.encode("The quick fox")
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert byte_level.decode(ids) == "The quick fox"
    assert byte_level.decode(ids, skip_special=False) == f"{BOS}The quick fox"
    assert max(ids) < byte_level.vocab_size


def test_offsets_point_into_the_text(byte_level: Tokenizer) -> None:
    text = "The fox 日本 jumps"
    ids, offsets = byte_level.encode_with_offsets(text)
    assert ids == byte_level.encode(text)
    assert offsets[0] == (0, 0)
    assert offsets[-1][1] == len(text)
    decoded = [(byte_level.decode([i], skip_special=False), span) for i, span in zip(ids, offsets, strict=True)]
    plain = [(piece, span) for piece, span in decoded if "\ufffd" not in piece]
    assert all(text[start:end] == piece for piece, (start, end) in plain[1:])


def test_token_pieces_are_those_of_transformers_and_special_tokens_are_named(
    byte_level: Tokenizer, tmp_path: Path
) -> None:
    """TGIS tells tokens as `convert_ids_to_tokens` does."""
    for tokenizer in (byte_level, Tokenizer.from_dir(save_sentence_pieces(tmp_path))):
        ids = tokenizer.encode("The \u65e5 \U0001f642 b")
        assert [tokenizer.token_piece(i) for i in ids] == tokenizer._hf.convert_ids_to_tokens(ids)
    assert byte_level.token_piece(1) == EOS
    assert byte_level.token_piece(10**6) == ""


def test_no_character_is_split_and_none_is_held_longer_than_needed(byte_level: Tokenizer) -> None:
    text = "a\U00010348z"  # four bytes that the vocabulary knows only one by one
    ids = byte_level.encode(text)[1:]
    assert len(ids) == 6
    assert stream(byte_level, ids) == ["a", "", "", "", "\U00010348", "z", ""]


def test_an_unfinished_character_comes_out_as_replacement_at_the_end(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a\U00010348")[:-1]
    assert stream(byte_level, ids)[-1] == "\ufffd"
    assert "".join(stream(byte_level, ids)) == byte_level.decode(ids)


@pytest.mark.parametrize(
    "text", ["naïve café 🙂🚀👩\u200d👩\u200d👧 中文文本", "<think>hm</think> →去 → 去", "", " \n\t  x "]
)
def test_a_stream_gives_the_text_back(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert "".join(stream(byte_level, ids)) == text == byte_level.decode(ids)
    assert "".join(stream(byte_level, ids, skip_special=False)) == BOS + text


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), skip_special=st.booleans())
def test_any_byte_level_ids_streamed_equal_the_same_ids_decoded_at_once(
    byte_level: Tokenizer, data: st.DataObject, skip_special: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 3), max_size=24))
    assert "".join(stream(byte_level, ids, skip_special)) == byte_level.decode(ids, skip_special=skip_special)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=12), skip_special=st.booleans())
def test_any_text_comes_back_from_a_stream_of_either_kind_of_vocabulary(
    byte_level: Tokenizer, pieces: Tokenizer, text: str, skip_special: bool
) -> None:
    spelt = [pieces.backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    for tokenizer, ids in ((byte_level, byte_level.encode(text)), (pieces, [1, 259, 260, *spelt, 262, *spelt])):
        assert "".join(stream(tokenizer, ids, skip_special)) == tokenizer.decode(ids, skip_special=skip_special)


def test_spaces_that_depend_on_the_token_before_are_right(pieces: Tokenizer) -> None:
    ids = [pieces.backend.token_to_id(token) for token in ("▁the", "▁a", "b", "<0xC3>", "<0xA9>", "▁the", "the")]
    assert stream(pieces, ids) == ["the", " a", "b", "", "é", " the", "the", ""]


def test_a_token_costs_the_same_late_in_a_long_text_as_early(byte_level: Tokenizer, pieces: Tokenizer) -> None:
    for tokenizer, token in ((byte_level, "a"), (pieces, "b")):
        decoded: list[int] = []
        detokenizer = IncrementalDetokenizer(tokenizer)
        decode = tokenizer.decode

        def counting(ids: list[int], skip_special: bool = True, decode: Any = decode, log: Any = decoded) -> str:
            log.append(len(ids))
            return str(decode(ids, skip_special))

        tokenizer.decode = counting  # type: ignore[method-assign]
        try:
            token_id = tokenizer.backend.token_to_id(token)
            assert all(detokenizer.push(token_id) == token for _ in range(300))
        finally:
            del tokenizer.decode  # type: ignore[method-assign]
        assert max(decoded, default=0) <= 3


def test_a_vocabulary_without_tokenizer_json_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; copy it"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="convert_tiktoken_to_fast"):
        Tokenizer.from_dir(tmp_path)


def test_a_converted_vocabulary_loads_although_its_settings_name_remote_code(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    remote = {"tokenizer_class": "TikTokenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_kimi.X", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | remote))
    (tmp_path / "tokenization_kimi.py").write_text("raise RuntimeError('remote code was run')")
    assert Tokenizer.from_dir(tmp_path).decode(Tokenizer.from_dir(tmp_path).encode("fox")) == "fox"


def test_bos_is_added_where_the_published_settings_ask_for_it(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    for name, change in {
        "tokenizer.json": {"post_processor": None},
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True},
    }.items():
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(content | change))
    tokenizer = Tokenizer.from_dir(tmp_path)
    ids, offsets = tokenizer.encode_with_offsets("fox")
    assert (ids[0], offsets[0], tokenizer.decode(ids)) == (0, (0, 0), "fox")
    assert ids.count(0) == 1
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"add_bos_token": False}))
    assert Tokenizer.from_dir(tmp_path).encode("fox") == ids[1:]


def test_broken_files_are_refused(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "eos_token_id": ["</s>"]}))
    with pytest.raises(CheckpointError, match="eos_token_id must be a token id or a list"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Tokenizer.from_dir(tmp_path)
