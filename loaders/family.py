"""What is known about published members of the model family: to word likely causes, and to tell twins apart."""

from collections.abc import Iterator, Mapping
from typing import Any

from loaders.adapter_types import AdapterTargets

_HIDDEN_SIZES = {
    2048: "V2-Lite or Moonlight",
    5120: "V2 or V2.5",
    7168: "V3, R1, V3.1 or Kimi-K2",
}


def models_with_hidden(hidden: int) -> str:
    """` (V2-Lite or Moonlight)` for a hidden size that published models have, else an empty string."""
    known = _HIDDEN_SIZES.get(hidden)
    return f" ({known})" if known else ""


# Moonlight and V2-Lite have experts of the same number and widths, so only the name tells their adapters apart.
_TWINS = {"moonlight": "deepseek_v3", "deepseek-v2-lite": "deepseek_v2", "deepseek-coder-v2-lite": "deepseek_v2",
          "esft-": "deepseek_v2"}  # fmt: skip
_TWIN_HIDDEN = 2048


def explain_other_base(config: Mapping[str, Any], targets: AdapterTargets) -> Iterator[str]:
    """A problem if base_model_name_or_path names a model whose experts fit this base, but which is another one."""
    name = config.get("base_model_name_or_path")
    hidden = {shape.hidden for shape in targets.experts.values()}
    if not isinstance(name, str) or targets.model_type is None or hidden != {_TWIN_HIDDEN}:
        return
    for twin, model_type in _TWINS.items():
        if twin in name.rsplit("/", 1)[-1].lower() and model_type != targets.model_type:
            yield (
                f"adapter_config.json: base_model_name_or_path is {name[:80]!r}, a {model_type}, and this base is a "
                f"{targets.model_type}: the shapes are equal, the models are not"
            )
