"""Names in adapter files: wrapper prefixes taken off, and split into module and side."""

import re
from functools import lru_cache

_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
_PREFIXES = ("base_model.model.", "language_model.")
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.weight)?$")
# NeMo Automodel joins the projection and the side in one name.
_NATIVE_FACTOR = re.compile(r"^(?P<module>.+\.mlp\.experts\.lora_(?:gate_and_up|down))_(?P<side>[AB])(?:\.weight)?$")
_HEAD = re.compile(r"^(?:model\.)?unembed_tokens\.")
_LAYER = re.compile(r"^model\.layers\.(0|[1-9][0-9]*)\.")
# Adapters of one base have the same names again and again.
_remembered = lru_cache(maxsize=2**14)


@_remembered
def plain_key(key: str) -> str:
    """A key without wrapper prefixes: `base_model.model.model.layers.0.x` -> `model.layers.0.x`."""
    key = _WRAPPER.sub("", key)
    while True:
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
        if prefix is None:
            break
        key = key.removeprefix(prefix)
    key = key.replace("model.language_model.", "model.", 1) if key.startswith("model.language_model.") else key
    key = _HEAD.sub("lm_head.", key)
    return f"model.{key}" if key.startswith("layers.") else key


@_remembered
def split_factor(plain: str) -> tuple[str, str] | None:
    """(module, "A" or "B") of a LoRA factor's plain key, None for any other key."""
    match = _FACTOR.match(plain) or _NATIVE_FACTOR.match(plain)
    return (match["module"], match["side"]) if match else None


@_remembered
def layer_of(name: str) -> int | None:
    """The layer index in a plain name, None outside layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None
