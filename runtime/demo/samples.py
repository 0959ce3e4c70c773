"""The bundled tasks: held-out prompts and the exact answers."""

from __future__ import annotations

import json
from dataclasses import dataclass

from runtime.demo import ADAPTERS_DIR, TASKS_DIR


@dataclass(frozen=True)
class Sample:
    """A held-out prompt and the exact answer."""

    prompt: str
    completion: str

    @property
    def max_new_tokens(self) -> int:
        """Room for the answer whatever its tokens are: none is shorter than a byte."""
        return len(self.completion.encode()) + 8


def read_tasks() -> dict[str, list[Sample]]:
    """The samples of every task that has an adapter of its name; raises ValueError if there is none."""
    tasks = {
        path.stem: _read_samples(path.read_text(encoding="utf-8"))
        for path in sorted(TASKS_DIR.glob("*.jsonl"))
        if (ADAPTERS_DIR / path.stem).is_dir()
    }
    if not tasks:
        raise ValueError(f"there are no demo tasks with adapters in {TASKS_DIR}")
    return tasks


def _read_samples(lines: str) -> list[Sample]:
    rows = [json.loads(line) for line in lines.splitlines() if line.strip()]
    return [Sample(row["prompt"], row["completion"]) for row in rows]
