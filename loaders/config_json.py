"""config.json of a Hugging Face model directory, with both ways of writing RoPE turned into one."""

from pathlib import Path
from typing import Any

from loaders.errors import CheckpointError
from loaders.json_file import read_json_object

MAX_CONFIG_BYTES = 4 * 1024 * 1024
DEFAULT_ROPE_THETA = 10_000.0
_TYPES_WITH_ORIGINAL_LENGTH = ("llama3", "longrope", "yarn")


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json as a dict in which `rope_theta` is a float and `rope_scaling` None or a dict with `rope_type`.

    Takes the classic keys (`rope_theta`, `rope_scaling` with `type` or `rope_type`) and transformers v5's
    `rope_parameters`, which is removed. A nested `text_config` is normalised in place. Raises CheckpointError.
    """
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: not found; a model directory holds config.json beside its safetensors files")
    config = read_json_object(path, MAX_CONFIG_BYTES, CheckpointError)
    text_config = config.get("text_config")
    if isinstance(text_config, dict):
        _normalise_rope(text_config, f"{path}: text_config.")
    else:
        _normalise_rope(config, f"{path}: ")
    return config


def read_eos_token_ids(model_dir: Path) -> frozenset[int]:
    """The tokens that end a text: `eos_token_id` of config.json and generation_config.json. Raises CheckpointError."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = Path(model_dir) / name
        if path.is_file():
            found |= _eos_in(path)
    return frozenset(found)


def _normalise_rope(config: dict[str, Any], where: str) -> None:
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key)
    config.pop("rope_parameters", None)
    if rope is not None and not isinstance(rope, dict):
        raise CheckpointError(f"{where}{key} must be an object or null, found {rope!r}")
    rope = dict(rope or {})

    # transformers gives the value inside the object precedence over the one beside it.
    theta = rope.pop("rope_theta", None)
    if theta is None:
        theta = config.get("rope_theta")
    config["rope_theta"] = _positive(theta, DEFAULT_ROPE_THETA, f"{where}rope_theta")

    rope_type = rope.pop("type", None)
    rope_type = rope.pop("rope_type", None) or rope_type or "default"
    if not isinstance(rope_type, str):
        raise CheckpointError(f"{where}{key}.rope_type must be a string, found {rope_type!r}")
    if rope_type == "default":
        config["rope_scaling"] = None
        return
    if "factor" in rope:
        _positive(rope["factor"], None, f"{where}{key}.factor")
    if rope_type in _TYPES_WITH_ORIGINAL_LENGTH and "max_position_embeddings" in config:
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    config["rope_scaling"] = {"rope_type": rope_type, **rope}


def _positive(value: object, default: float | None, where: str) -> float:
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"{where} must be a positive number, found {value!r}")
    return float(value)


def _eos_in(path: Path) -> set[int]:
    """`eos_token_id` of a config file: a number, a list, or absent (also in `text_config`)."""
    config = read_json_object(path, MAX_CONFIG_BYTES, CheckpointError)
    text_config = config.get("text_config")
    value = config.get("eos_token_id")
    if value is None and isinstance(text_config, dict):
        value = text_config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them, found {value!r}")
    return set(ids)
