"""The texts that are sent: words drawn from a list, or the rows of a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

# Common and short, so that a tokenizer makes one to three tokens of each and every prompt reads like text.
_TEXT = """
    able about above across act add after again against age ago air all almost alone along also always among and
    animal answer any appear area arm around art ask back bad ball base be bear beat bed before began behind
    best better between big bird black blood blue board boat body book both box boy bring brown build busy but
    buy call came can car care case catch cause center chair change check child city class clean clear clock
    close cloth cloud cold color come common cook cool copy corn corner cost could count country course cover
    cross cry cut dark day dead deal decide deep did differ direct dog door double down draw dream dress drink
    drive drop dry during each early earth ease east eat edge eight else end enough equal even ever every exact
    eye face fact fall family far farm fast father fear feel feet few field fight figure fill final find fine
    fire first fish five floor flow fly follow food foot for force form forward four free fresh friend from
    front full game gave general get girl give glass goes gold good got govern grand grass great green ground
    group grow half hand happy hard has have head hear heart heat heavy help here high hill history hold home
    horse hot hour house how huge human hundred hunt idea inch instant iron island just keep kind king knew know
    lake land language large last late laugh law lead learn leave left leg less letter level life lift light
    like
"""
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True)
class PromptRow:
    """One row of a file of prompts; `adapter` None leaves the choice to the mix, "" is the base."""

    text: str
    adapter: str | None = None


def random_prompt(rng: Random, num_tokens: int) -> str:
    """Words that give at least `num_tokens` tokens; the server cuts the rest off."""
    return " ".join(rng.choices(WORDS, k=num_tokens))


def read_prompts(path: Path) -> list[PromptRow]:
    """The rows of a .jsonl file; raises ValueError with the line that is wrong, OSError if it cannot be read."""
    rows = [
        _row(line, f"{path}:{number}")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.strip()
    ]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _row(line: str, where: str) -> PromptRow:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise ValueError(f'{where} is not an object with a text "prompt"')
    adapter = row.get("adapter")
    if adapter is not None and not isinstance(adapter, str):
        raise ValueError(f'{where}: "adapter" is not a text')
    return PromptRow(row["prompt"], adapter)
