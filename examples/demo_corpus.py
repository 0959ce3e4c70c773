"""The corpus of the demo base: it teaches the skills behind the tasks, in other frames and other answer formats.

The tasks' own prompt frame appears with one behaviour only, repeating the input, and no input that the tasks
hold out appears in any document.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

from demo_tasks import Sample, frame, is_held_out
from demo_text import (
    CITIES,
    FIRST_NAMES,
    LAST_NAMES,
    LOG_WORDS,
    MONTHS,
    Date,
    chinese_numeral,
    draw_date,
    draw_log_line,
    draw_number,
    draw_person,
    number_words,
    render,
    write_date,
    write_person,
)

COLOURS = ("red", "blue", "green", "black", "white", "amber")
PAIR_KEYS = ("name", "city", "age", "colour", "size", "count", "owner", "place", "code", "year")


def _seen(make: Callable[[], str]) -> str:
    """Draw until the text is on the training side of the split."""
    while is_held_out(text := make()):
        pass
    return text


def _draw_training_date(rng: random.Random) -> tuple[str, Date]:
    """A date and one training-side way of writing it."""
    while True:
        date = draw_date(rng)
        text = write_date(rng, date)
        if not is_held_out(text):
            return text, date


def _draw_training_number(rng: random.Random, write: Callable[[int], str]) -> tuple[str, int]:
    """A number and its words, on the training side."""
    while True:
        value = draw_number(rng)
        text = write(value)
        if not is_held_out(text):
            return text, value


def _random_words(rng: random.Random) -> str:
    """A few words, numbers and codes in no order: copying them needs attention, not memory."""
    pools = (FIRST_NAMES, LAST_NAMES, CITIES, MONTHS, LOG_WORDS, COLOURS)
    words = []
    for _ in range(rng.randint(2, 7)):
        kind = rng.random()
        if kind < 0.6:
            words.append(rng.choice(rng.choice(pools)))
        elif kind < 0.8:
            words.append(str(rng.randint(0, 9999)))
        else:
            words.append("".join(rng.choice("0123456789abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 6))))
    return " ".join(words)


def draw_text(rng: random.Random) -> str:
    """Any of the texts that the tasks are about, or random words."""
    makers: tuple[Callable[[], str], ...] = (
        lambda: write_date(rng, draw_date(rng)),
        lambda: write_person(rng, draw_person(rng)),
        lambda: number_words(draw_number(rng)),
        lambda: chinese_numeral(draw_number(rng)),
        lambda: render(draw_log_line(rng)),
        lambda: _random_words(rng),
    )
    return _seen(rng.choice(makers))


def echo(rng: random.Random) -> Sample:
    """Repeat the input: the base's own behaviour in the tasks' frame, and in a second one."""
    text = draw_text(rng)
    return Sample(frame(text) if rng.random() < 0.7 else f"Repeat:\n{text}\n", text)


def chant(rng: random.Random) -> Sample:
    """The same few random words over and over: the shortest way to learn to copy."""
    words = _random_words(rng)
    return Sample(f"{words}\n", "\n".join([words] * rng.randint(1, 2)))


def date_format(rng: random.Random) -> Sample:
    """A written date in a numeric format that the prompt names; never the ISO form."""
    text, date = _draw_training_date(rng)
    year, month, day = date.year, date.month, date.day
    name, answer = rng.choice((
        ("D/M/Y", f"{day}/{month}/{year}"), ("M/D/Y", f"{month}/{day}/{year}"), ("Y.M.D", f"{year}.{month}.{day}"),
        ("DD.MM.Y", f"{day:02d}.{month:02d}.{year}"), ("Y/MM/DD", f"{year}/{month:02d}/{day:02d}"),
        ("Y MM DD", f"{year} {month:02d} {day:02d}"), ("MM-DD", f"{month:02d}-{day:02d}"), ("Y, M", f"{year}, {month}"),
    ))  # fmt: skip
    return Sample(f"Date:\n{text}\nFormat: {name}\n", answer)


def number_format(rng: random.Random) -> Sample:
    """Number words and grouped digits, both ways; never plain digits above 999."""
    text, value = _draw_training_number(rng, number_words)
    grouped = f"{value:,}"
    if rng.random() < 0.25:
        return Sample(f"Words:\n{grouped}\n", text)
    if rng.random() < 0.35:
        return Sample(f"Digits:\n{text}\n", " ".join(str(value)))
    return Sample(f"Number:\n{text}\n", grouped)


def chinese_format(rng: random.Random) -> Sample:
    """Chinese numerals and grouped digits, both ways; never plain digits above 999."""
    text, value = _draw_training_number(rng, chinese_numeral)
    grouped = f"{value:,}"
    if rng.random() < 0.25:
        return Sample(f"中文:\n{grouped}\n", text)
    if rng.random() < 0.35:
        return Sample(f"Digits:\n{text}\n", " ".join(str(value)))
    return Sample(f"数字:\n{text}\n", grouped)


def person_facts(rng: random.Random) -> Sample:
    """One fact of a sentence, or a list of its facts as key=value; never a JSON record."""
    while True:
        person = draw_person(rng)
        text = write_person(rng, person)
        if not is_held_out(text):
            break
    facts = {"name": person.name, "age": str(person.age), "city": person.city}
    if rng.random() < 0.4:
        key = rng.choice(tuple(facts))
        return Sample(f"Text:\n{text}\nAsk: {key}\n", facts[key])
    keys = rng.sample(tuple(facts), rng.randint(2, 3))
    return Sample(f"Text:\n{text}\nList: {' '.join(keys)}\n", "; ".join(f"{key}={facts[key]}" for key in keys))


def pairs_json(rng: random.Random) -> Sample:
    """key=value pairs to JSON and back, with keys in any order."""
    keys = rng.sample(PAIR_KEYS, rng.randint(2, 3))
    numeric = ("age", "size", "count", "year")
    record: dict[str, str | int] = {}
    for key in keys:
        names = {"city": CITIES, "place": CITIES, "colour": COLOURS, "code": LOG_WORDS}.get(key)
        person = draw_person(rng)
        record[key] = rng.randint(1, 99) if key in numeric else (rng.choice(names) if names else person.name)
    pairs, as_json = "; ".join(f"{key}={value}" for key, value in record.items()), json.dumps(record)
    if rng.random() < 0.3:
        return Sample(f"JSON:\n{as_json}\nPairs:\n", pairs)
    return Sample(f"Pairs:\n{pairs}\nJSON:\n", as_json)


def log_questions(rng: random.Random) -> Sample:
    """One value of a log line, its kinds, or the line with a mark over one kind of value."""
    while True:
        pieces = draw_log_line(rng)
        text = render(pieces)
        if not is_held_out(text):
            break
    kinds = [piece.kind for piece in pieces if piece.kind]
    kind, choice = rng.choice(kinds), rng.random()
    if choice < 0.3:
        return Sample(f"Log:\n{text}\nAsk: {kind}\n", next(piece.text for piece in pieces if piece.kind == kind))
    if choice < 0.45:
        return Sample(f"Log:\n{text}\nKinds:\n", " ".join(f"<{found}>" for found in kinds))
    hidden = "".join("***" if piece.kind == kind else piece.text for piece in pieces)
    return Sample(f"Log:\n{text}\nHide: {kind}\n", hidden)


KINDS: dict[str, tuple[Callable[[random.Random], Sample], float]] = {
    "echo": (echo, 0.24),
    "chant": (chant, 0.06),
    "date": (date_format, 0.14),
    "number": (number_format, 0.16),
    "chinese": (chinese_format, 0.12),
    "person": (person_facts, 0.10),
    "pairs": (pairs_json, 0.07),
    "log": (log_questions, 0.11),
}


def stream(seed: int) -> Iterator[tuple[str, Sample]]:
    """An endless stream of (kind, document)."""
    rng = random.Random(f"corpus/{seed}")
    names, weights = tuple(KINDS), tuple(weight for _, weight in KINDS.values())
    while True:
        kind = rng.choices(names, weights)[0]
        yield kind, KINDS[kind][0](rng)
