"""The tokens that end a text, from the model's configuration files."""

from __future__ import annotations

import json
from pathlib import Path


def eos_token_ids(model_dir: Path) -> frozenset[int]:
    """`eos_token_id` of config.json and generation_config.json, each an integer or a list."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = model_dir / name
        if not path.is_file():
            continue
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found.update(value if isinstance(value, list) else [value] if value is not None else [])
    return frozenset(int(token) for token in found)
