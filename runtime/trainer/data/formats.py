"""Rows as users bring them (chat, prompt-completion, text, Alpaca, ShareGPT) -> turns of a chat, or plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from runtime.trainer.data.errors import RowError

Row = Mapping[str, Any]

_KEYS = {
    "chat": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}
_ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# Dropping these would teach another answer than the one in the file.
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side of a chat says; `role` is system, user or assistant, and only the assistant's turns are learnt."""

    role: str
    content: str
    is_target: bool


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, to be written out by a template."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text without a template: `prompt` is read, `completion` is learnt."""

    prompt: str
    completion: str


Example = Chat | PlainText


def detect_format(row: Row) -> str:
    """The one format whose keys the row has; raises RowError if there is none, or more than one."""
    matching = [name for name, keys in _KEYS.items() if all(row.get(key) is not None for key in keys)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise RowError(f"the keys fit the formats {' and '.join(matching)}: set data.format to the one that is meant")
    known = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in _KEYS.items())
    raise RowError(f"the keys ({_found(row)}) are those of no format ({known})")


def read_example(row: Row, format_name: str) -> Example:
    """Check a row against its format and bring it into the neutral form; raises RowError saying what is wrong.

    Keys that the format does not know, such as an id, are passed over.
    """
    missing = [key for key in _KEYS[format_name] if row.get(key) is None]
    if missing:
        raise RowError(f"no {' and no '.join(missing)}, which a {format_name} row has (found: {_found(row)})")
    return _READERS[format_name](row)


def _read_chat(row: Row) -> Example:
    return _chat(_messages(row["messages"], "messages"))


def _read_prompt_completion(row: Row) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        read = tuple(replace(turn, is_target=False) for turn in _messages(prompt, "prompt"))
        return _chat(read + _messages(completion, "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return PlainText(_text(prompt, "prompt"), _text(completion, "completion"))
    raise RowError(
        f"prompt is {_kind(prompt)} and completion is {_kind(completion)}: both are strings, or both lists of messages"
    )


def _read_text(row: Row) -> Example:
    text = _text(row["text"], "text")
    if not text:
        raise RowError("text is empty")
    return PlainText("", text)


def _read_alpaca(row: Row) -> Example:
    question, extra = _text(row["instruction"], "instruction"), _text(row.get("input") or "", "input")
    turns = [*_system_of(row)]
    for number, pair in enumerate(_list(row["history"], "history") if row.get("history") else (), 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history {number} is not a pair of question and answer")
        turns += _exchange(_text(pair[0], f"history {number}"), _text(pair[1], f"history {number}"))
    turns += _exchange(f"{question}\n{extra}" if extra else question, _text(row["output"], "output"))
    return _chat(tuple(turns))


def _read_sharegpt(row: Row) -> Example:
    turns = _list(row["conversations"], "conversations")
    return _chat(_system_of(row) + tuple(_sharegpt_turn(turn, f"turn {n}") for n, turn in enumerate(turns, 1)))


def _sharegpt_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise RowError(f"{where} is {_kind(turn)}, expected an object with from and value")
    role = _SHAREGPT_ROLES.get(str(turn.get("from")))
    if role is None:
        raise RowError(f"{where}: from is {_shown(turn.get('from'))}, expected one of {', '.join(_SHAREGPT_ROLES)}")
    return Turn(role, _text(turn.get("value"), f"{where}: value"), role == "assistant")


def _messages(value: Any, name: str) -> tuple[Turn, ...]:
    return tuple(_turn(message, f"{name} {n}") for n, message in enumerate(_list(value, name), 1))


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise RowError(f"{where} is {_kind(message)}, expected an object with role and content")
    role = message.get("role")
    if role not in _ROLES:
        raise RowError(f"{where}: role is {_shown(role)}, expected one of {', '.join(_ROLES)}")
    unsupported = [key for key in _UNSUPPORTED if message.get(key)]
    if unsupported:
        raise RowError(f"{where} has {', '.join(unsupported)}, which is not read: write it out in content")
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise RowError(f"{where}: weight is {_shown(weight)}, expected 1 (learnt) or 0 (only read)")
    return Turn(role, _text(message.get("content"), f"{where}: content"), role == "assistant" and weight == 1)


def _chat(turns: tuple[Turn, ...]) -> Chat:
    roles = [turn.role for turn in turns]
    num_system = next((n for n, role in enumerate(roles) if role != "system"), len(roles))
    if "system" in roles[num_system:]:
        raise RowError("a system text stands after the first turn of the user or the assistant, expected in front")
    if not any(turn.is_target for turn in turns):
        raise RowError("nothing to learn: no turn of the assistant")
    return Chat(turns)


def _exchange(question: str, answer: str) -> tuple[Turn, Turn]:
    return Turn("user", question, False), Turn("assistant", answer, True)


def _system_of(row: Row) -> tuple[Turn, ...]:
    system = _text(row.get("system") or "", "system")
    return (Turn("system", system, False),) if system else ()


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} is {_kind(value)}, expected a list with at least one entry")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is {_kind(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{name} holds half of a surrogate pair (\\ud800 to \\udfff), which is not text") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null or absent"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    return repr(value[:40]) if isinstance(value, str) else repr(value)[:40]


def _found(row: Row) -> str:
    keys = sorted(key[:40].encode("utf-8", "replace").decode() for key in row)
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "") if keys else "no keys"


_READERS = {
    "chat": _read_chat,
    "prompt-completion": _read_prompt_completion,
    "text": _read_text,
    "alpaca": _read_alpaca,
    "sharegpt": _read_sharegpt,
}
