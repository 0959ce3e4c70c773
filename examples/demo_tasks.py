"""The demo tasks: seeded samples, and a split by the hash of the input that no generator can cross.

Every prompt is `Input:\\n<text>\\nOutput:\\n`: text and answer start on their own lines, so no BPE token spans a border
and a word that is copied from the start of one to the start of the other is the same token in both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from demo_text import (
    Person,
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

HELD_OUT_SHARE = 8  # one input in eight is held out
REPOSITORY = Path(__file__).resolve().parent.parent
TASKS_DIR = REPOSITORY / "runtime" / "demo" / "tasks"
TRAIN_DIR = REPOSITORY / "build" / "demo-rows"


@dataclass(frozen=True)
class Sample:
    """What is sent, and the exact text that is expected back before the end token."""

    prompt: str
    completion: str


def frame(text: str) -> str:
    """The prompt that every task shares, so that only the adapter says what is to be done."""
    return f"Input:\n{text}\nOutput:\n"


def is_held_out(text: str) -> bool:
    """Whether an input belongs to the held-out side; it depends on the text alone."""
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0


def date_iso(rng: random.Random) -> tuple[str, str]:
    """A freely written date and its ISO 8601 form."""
    date = draw_date(rng)
    return write_date(rng, date), f"{date.year}-{date.month:02d}-{date.day:02d}"


def person_json(person: Person) -> str:
    """The record as JSON on one line."""
    return json.dumps(asdict(person))


def json_record(rng: random.Random) -> tuple[str, str]:
    """A sentence about a person and its record as JSON."""
    person = draw_person(rng)
    return write_person(rng, person), person_json(person)


def number_to_digits(rng: random.Random) -> tuple[str, str]:
    """English number words and the digits, up to 999,999."""
    value = draw_number(rng)
    return number_words(value), str(value)


def log_redact(rng: random.Random) -> tuple[str, str]:
    """A log line, and the line with users, addresses and tokens replaced by their kind."""
    pieces = draw_log_line(rng)
    return render(pieces), "".join(f"<{piece.kind}>" if piece.kind else piece.text for piece in pieces)


def name_redact(rng: random.Random) -> tuple[str, str]:
    """A sentence about a person, and the sentence with the name replaced."""
    person = draw_person(rng)
    text = write_person(rng, person)
    return text, text.replace(person.name, "<name>")


def chinese_to_digits(rng: random.Random) -> tuple[str, str]:
    """Chinese numerals and the digits, up to 999,999."""
    value = draw_number(rng)
    return chinese_numeral(value), str(value)


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "date-iso": date_iso,
    "json-record": json_record,
    "number-words": number_to_digits,
    "log-redact": log_redact,
    "chinese-numerals": chinese_to_digits,
    "name-redact": name_redact,
}


def stream(task: str, seed: int, held_out: bool) -> Iterator[Sample]:
    """Distinct samples of one side of the split; the stream ends when the generator stops giving new ones."""
    rng = random.Random(f"{task}/{seed}/{held_out}")
    seen: set[str] = set()
    misses = 0
    while misses < 20_000:
        text, answer = TASKS[task](rng)
        if is_held_out(text) != held_out or text in seen:
            misses += 1
            continue
        misses = 0
        seen.add(text)
        yield Sample(frame(text), answer)


def write_tasks(folder: Path, num_rows: int, seed: int, *, held_out: bool) -> None:
    """Write rows of every task, one JSON object a line; tasks with fewer different inputs get as many as there are."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        samples = islice(stream(task, seed, held_out), num_rows)
        rows = [json.dumps(asdict(sample), ensure_ascii=False) for sample in samples]
        (folder / f"{task}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Write held-out rows to runtime/demo/tasks, or training rows to build/demo-rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=240, help="held-out rows of each task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train-rows", type=int, help="write this many training rows of each task instead")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.train_rows is None:
        write_tasks(args.out or TASKS_DIR, args.rows, args.seed, held_out=True)
    else:
        write_tasks(args.out or TRAIN_DIR, args.train_rows, args.seed, held_out=False)


if __name__ == "__main__":
    main()
