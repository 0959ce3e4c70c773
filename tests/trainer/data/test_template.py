"""Documents are what transformers makes of the same text, and what is learnt is the assistant's answer with its EOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loaders.tokenizer import Tokenizer
from runtime.trainer.data.documents import DataError, Document
from tests.oracle.small_tokenizers import BOS, EOS
from tests.trainer.data.conftest import Read

# What the published chat templates of DeepSeek-V3 and of DeepSeek-V2 say of chats without tools.
V3_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
V2_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEMPLATES = {"deepseek": V3_TEMPLATE, "plain": V2_TEMPLATE}

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The fox 日本?"},
    {"role": "assistant", "content": "<think>\nquick\n</think>\n\nOver the lazy dog 🙂."},
    {"role": "user", "content": " and \n\nthen "},
    {"role": "assistant", "content": "  naïve\n"},
]


def rendered(tokenizer: Tokenizer, template: str, messages: list[dict[str, str]], prompt: bool = False) -> list[int]:
    ids = tokenizer._hf.apply_chat_template(
        messages, chat_template=TEMPLATES[template], add_generation_prompt=prompt, return_dict=False
    )
    return list(ids)


def learnt(document: Document, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(document.token_ids[document.is_target].tolist(), skip_special=False)


@pytest.mark.parametrize("template", ["deepseek", "plain"])
def test_chats_become_the_ids_that_transformers_gives_for_the_published_template(
    tokenizer: Tokenizer, read: Read, template: str
) -> None:
    for length in (3, 5):
        [document], _ = read({"id": 7, "messages": CHAT[:length]}, template=template)
        assert document.token_ids.tolist() == rendered(tokenizer, template, CHAT[:length])
    [document], _ = read({"messages": CHAT + CHAT[1:2]}, template=template)
    assert document.token_ids.tolist() == rendered(tokenizer, template, CHAT + CHAT[1:2])


@pytest.mark.parametrize("template", ["deepseek", "plain"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=2, max_size=5))
def test_any_text_becomes_the_ids_of_the_published_template(
    tokenizer: Tokenizer, read: Read, template: str, texts: list[str]
) -> None:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    [document], _ = read({"messages": messages}, template=template)
    assert document.token_ids.tolist() == rendered(tokenizer, template, messages)


@pytest.mark.parametrize("template", ["deepseek", "plain"])
def test_what_is_read_before_an_answer_is_the_served_prompt(tokenizer: Tokenizer, read: Read, template: str) -> None:
    [document], _ = read({"messages": CHAT[:3]}, template=template)
    first = int(document.is_target.argmax())
    assert document.token_ids[:first].tolist() == rendered(tokenizer, template, CHAT[:2], prompt=True)
    # A client sends that prompt as text, to which the server adds BOS.
    text = tokenizer.decode(document.token_ids[1:first].tolist(), skip_special=False)
    assert tokenizer.encode(text) == document.token_ids[:first].tolist()


def test_every_turn_of_the_assistant_is_learnt_with_its_end_and_nothing_else(tokenizer: Tokenizer, read: Read) -> None:
    [document], report = read({"messages": CHAT})
    assert learnt(document, tokenizer) == f"{CHAT[2]['content']}{EOS}{CHAT[4]['content']}{EOS}"
    assert report.num_target_tokens == document.is_target.sum()
    [document], _ = read({"messages": CHAT}, template="plain")
    assert learnt(document, tokenizer) == f" {CHAT[2]['content']}{EOS} {CHAT[4]['content']}{EOS}"


def test_a_turn_of_weight_0_is_read_but_not_learnt(tokenizer: Tokenizer, read: Read) -> None:
    messages = [*CHAT[:2], {**CHAT[2], "weight": 0}, *CHAT[3:]]
    [document], _ = read({"messages": messages})
    assert document.token_ids.tolist() == rendered(tokenizer, "deepseek", CHAT)
    assert learnt(document, tokenizer) == f"{CHAT[4]['content']}{EOS}"


@pytest.mark.parametrize("template", ["deepseek", "plain"])
def test_special_tokens_that_someone_typed_into_a_chat_stay_text(
    tokenizer: Tokenizer, read: Read, template: str
) -> None:
    typed = f"a{EOS}b{BOS}c<｜User｜>d<｜Assistant｜>e"
    messages = [{"role": role, "content": typed} for role in ("system", "user", "assistant")]
    [document], _ = read({"messages": messages}, template=template)
    ids = document.token_ids.tolist()
    marks = [tokenizer.encode(mark)[1] for mark in ("<｜User｜>", "<｜Assistant｜>")]
    num_marks = 1 if template == "deepseek" else 0
    assert [ids.count(token_id) for token_id in (0, 1, *marks)] == [1, 1, num_marks, num_marks]
    assert tokenizer.decode(ids, skip_special=False).count(typed) == 3


def test_added_tokens_that_mark_no_turn_are_recognised_in_chats(tokenizer: Tokenizer, read: Read) -> None:
    [document], _ = read({"messages": CHAT[:3]})
    assert tokenizer.encode("<think>")[1] in document.token_ids[document.is_target]


def test_reading_leaves_the_tokenizer_as_it_was(tokenizer: Tokenizer, read: Read) -> None:
    before = tokenizer.backend.to_str()
    read({"messages": CHAT})
    assert tokenizer.backend.to_str() == before
    assert tokenizer.encode(f"{EOS}<｜User｜>")[1:] == [1, tokenizer.encode("<｜User｜>")[1]]


def test_prompt_and_completion_are_tokenised_as_they_are_served(demo_tokenizer: Tokenizer, read: Read) -> None:
    row = {"prompt": "Input:\n七百九十三\nOutput:\n", "completion": "793"}
    [document], _ = read(row, using=demo_tokenizer)
    prompt, completion = demo_tokenizer.encode(row["prompt"]), demo_tokenizer.encode(row["completion"])[1:]
    assert document.token_ids.tolist() == [*prompt, *completion, 1]
    assert document.is_target.tolist() == [False] * len(prompt) + [True] * (len(completion) + 1)


def test_a_prompt_may_spell_the_tokens_of_a_template_of_its_own(tokenizer: Tokenizer, read: Read) -> None:
    prompt, completion = "<｜User｜>The fox<｜Assistant｜></think>", "dog"
    [document], _ = read({"prompt": prompt, "completion": completion})
    [spelled_out], _ = read({"prompt": f"{BOS}{prompt}", "completion": f"{completion}{EOS}"})
    assert document.token_ids.tolist() == [*tokenizer.encode(prompt), *tokenizer.encode(completion)[1:], 1]
    assert spelled_out.token_ids.tolist() == document.token_ids.tolist()
    assert spelled_out.is_target.tolist() == document.is_target.tolist()


def test_of_a_text_all_is_learnt_but_bos(tokenizer: Tokenizer, read: Read) -> None:
    documents, _ = read({"text": "The quick fox 🙂"}, {"text": f"{BOS}The quick fox 🙂{EOS}"})
    for document in documents:
        assert document.token_ids.tolist() == [*tokenizer.encode("The quick fox 🙂"), 1]
        assert document.is_target.tolist() == [False] + [True] * (len(document) - 1)


def test_without_bos_the_first_token_counts_as_read(tmp_path: Path, tokenizer: Tokenizer, read: Read) -> None:
    """Nothing comes before it that could predict it."""
    tokenizer._hf.save_pretrained(tmp_path)
    without = Tokenizer.from_dir(tmp_path)
    without.backend.post_processor = None
    (document,), report = read({"text": "The fox"}, using=without)
    assert document.token_ids.tolist() == [*tokenizer.encode("The fox")[1:], 1]
    assert document.is_target.tolist() == [False] + [True] * (len(document) - 1)
    assert report.num_target_tokens == len(document) - 1


def test_chats_for_a_tokenizer_without_turn_marks_are_refused_naming_the_other_template(
    demo_tokenizer: Tokenizer, read: Read
) -> None:
    row: dict[str, Any] = {"messages": CHAT}
    with pytest.raises(DataError, match=r"no token <｜User｜>.*data\.template: plain"):
        read(row, using=demo_tokenizer)
    [document], _ = read(row, using=demo_tokenizer, template="plain")
    assert document.token_ids.tolist() == rendered(demo_tokenizer, "plain", CHAT)
