"""README.md of an exported adapter: a Hugging Face model card with how it was made, how good it is, how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_TAGS = ("lora", "moe", "deepseek", "graft")


def model_card(
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
    notes: Sequence[str],
    *,
    name: str = "adapter",
    base_name: str | None = None,
) -> str:
    """The card of the adapter `name`; `settings`, `metrics` and `notes` may be empty and are then left out.

    `base_name` is what adapter_config.json calls the base (a hub id, say).
    """
    parts = [_front_matter(base_name), f"# {name}", f"A LoRA adapter for {_code(base_name or 'its base model')}."]
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    if metrics:
        rows = {key: f"{value:.6g}" for key, value in metrics.items()}
        parts += ["## Metrics", _table("metric", rows)]
    parts += ["## Use", _usage(name, base_name)]
    if settings:
        parts += ["## Training settings", _table("setting", settings)]
    return "\n\n".join(parts) + "\n"


def merged_card(name: str, base_name: str, adapter_name: str) -> str:
    """The card of the model `name`: a base with an adapter merged into it."""
    fields = {"base_model": base_name, "base_model_relation": "merge", "library_name": "transformers"}
    text = f"`{base_name}` with the LoRA adapter `{adapter_name}` merged into its weights."
    return "\n\n".join((_yaml(fields), f"# {name}", text, f"Serve it with `graft serve {name}`.")) + "\n"


def _front_matter(base_name: str | None) -> str:
    fields: dict[str, Any] = {} if base_name is None else {"base_model": base_name}
    return _yaml(fields | {"library_name": "peft", "pipeline_tag": "text-generation", "tags": list(_TAGS)})


def _yaml(fields: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True)}---"


def _usage(name: str, base_name: str | None) -> str:
    base = base_name or "BASE"
    return f"""In a running Graft server (PATH is this folder, relative to the server's adapters root):

```
graft adapters load {name} PATH
graft generate --adapter {name} "PROMPT"
```

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "PATH")
```"""


def _table(heading: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {heading} | value |", "|---|---|"]
    lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """A value on one line that does not end its cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _code(text: str) -> str:
    return text if text == "its base model" else f"`{text}`"
