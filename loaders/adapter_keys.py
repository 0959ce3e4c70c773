"""Keys of adapter files: prefixes taken off, split into module and side, and the ones that cannot be used explained."""

import re
from dataclasses import dataclass, field

from loaders.adapter_folder import AdapterTensor
from loaders.adapter_types import AdapterTargets
from loaders.family import models_with_hidden

_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_PREFIXES = ("base_model.model.", "module.", "language_model.")
_SIDE = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])\.(?:(?!weight$)[^.]+\.)?weight$")
_LAYER = re.compile(r"^model\.layers\.(0|[1-9][0-9]*)\.")
_MAX_MTP_LAYERS = 3
_OTHER_LAYOUTS = (
    (re.compile(r"\.mlp\.experts\.w[123]\.lora_[AB]"), "looks like the Tinker layout (w1/w2/w3)"),
    (re.compile(r"\.block_sparse_moe\."), "Mixtral-style names"),
    (re.compile(r"lora_(gate_and_up|down)_[AB]$"), "looks like NeMo Automodel's own layout"),
    (re.compile(r"weight[12]_lora_[ab]$"), "looks like a Megatron / MindSpeed shard"),
    (re.compile(r"\.mlp\.experts\.(gate|up|down|gate_up)_proj\.lora_[AB]"), "looks like SGLang's 3-D layout"),
)


@dataclass(frozen=True)
class FactorPair:
    """The two factors of one module, as headers; `module` is the plain name."""

    module: str
    a: AdapterTensor
    b: AdapterTensor

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of lora_A in the file."""
        return self.a.stored.shape

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Shape of lora_B in the file."""
        return self.b.stored.shape


@dataclass
class SortedKeys:
    """All keys of an adapter: pairs to use, and what was skipped or is wrong."""

    pairs: list[FactorPair] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def plain_key(key: str) -> str:
    """A key without wrapper prefixes: `base_model.model.model.layers.0.x` -> `model.layers.0.x`."""
    key = _WRAPPER.sub("", key)
    while True:
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
        if prefix is None:
            break
        key = key.removeprefix(prefix)
    key = key.replace("model.language_model.", "model.", 1) if key.startswith("model.language_model.") else key
    return f"model.{key}" if key.startswith("layers.") else key


def layer_of(name: str) -> int | None:
    """The layer index in a plain name, None outside layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def sort_keys(tensors: tuple[AdapterTensor, ...], targets: AdapterTargets) -> SortedKeys:
    """Split every key into module and side and pair A with B; nothing is left unaccounted for."""
    result = SortedKeys()
    plain_keys = [plain_key(tensor.stored.name) for tensor in tensors]
    mtp_layers = _mtp_layers(plain_keys, targets)
    halves: dict[str, dict[str, AdapterTensor]] = {}
    for tensor, plain in zip(tensors, plain_keys, strict=True):
        key = tensor.stored.name
        match = _SIDE.match(plain)
        if layer_of(plain) in mtp_layers:
            result.skipped.append((key, "belongs to a multi-token-prediction layer, which serving does not use"))
        elif match is None:
            _sort_other(key, plain, tensor, targets, result)
        elif match["side"] in halves.setdefault(match["module"], {}):
            other = halves[match["module"]][match["side"]].stored.name
            result.problems.append(f"{key}: duplicate, {other} names the same factor")
        else:
            halves[match["module"]][match["side"]] = tensor
    for module, sides in halves.items():
        _pair(module, sides, result)
    return result


def _pair(module: str, sides: dict[str, AdapterTensor], result: SortedKeys) -> None:
    if len(sides) < 2:
        found, missing = ("lora_A", "lora_B") if "A" in sides else ("lora_B", "lora_A")
        result.problems.append(f"{module}: has {found} but no {missing}")
        return
    pair = FactorPair(module, sides["A"], sides["B"])
    if pair.a.stored.num_bytes == 0 and pair.b.stored.num_bytes == 0:
        for tensor in (pair.a, pair.b):
            result.skipped.append((tensor.stored.name, "empty tensor, a placeholder without effect"))
    else:
        result.pairs.append(pair)


def _mtp_layers(plain_keys: list[str], targets: AdapterTargets) -> set[int | None]:
    """Layer indices just past the base's last layer; many of them mean another base, not prediction layers."""
    layers = {layer_of(plain) for plain in plain_keys}
    beyond = {layer for layer in layers if layer is not None and layer >= targets.num_hidden_layers}
    allowed = set(range(targets.num_hidden_layers, targets.num_hidden_layers + _MAX_MTP_LAYERS))
    return set(beyond) if beyond <= allowed else set()


def _sort_other(key: str, plain: str, tensor: AdapterTensor, targets: AdapterTargets, result: SortedKeys) -> None:
    shape = list(tensor.stored.shape)
    if plain.endswith(".base_layer.weight"):
        module = plain.removesuffix(".base_layer.weight")
        expected = targets.linears.get(module)
        if expected is None or tensor.stored.shape == expected:
            result.skipped.append((key, "copy of the base's own weight"))
        else:
            result.problems.append(
                f"{key}: shape {shape}, the base has {list(expected)}: trained with a resized vocabulary?"
            )
    elif "lora_magnitude_vector" in plain:
        result.problems.append(f"{key}: a DoRA magnitude, DoRA is not supported")
    elif "lora_embedding_" in plain:
        result.problems.append(f"{key}: LoRA on the token embedding is not supported")
    elif plain.endswith(".bias"):
        result.problems.append(f"{key}: biases are not supported")
    elif layout := next((text for regex, text in _OTHER_LAYOUTS if regex.search(plain)), None):
        result.problems.append(f"{key}: {layout}, which is not supported yet")
    elif plain.endswith(".weight"):
        result.problems.append(f"{key}: a full weight {shape} (modules_to_save?), only LoRA factors are supported")
    else:
        result.problems.append(f"{key}: not a LoRA key this loader knows")


def explain_unknown(module: str, targets: AdapterTargets) -> str:
    """Why a LoRA on `module` cannot be applied to this base."""
    layer = layer_of(module)
    leaf = module.rsplit(".", 1)[-1]
    if layer is not None and layer >= targets.num_hidden_layers:
        return f"{module}: the base has only {targets.num_hidden_layers} layers; trained on a larger base?"
    if module.endswith(".mlp.gate"):
        return f"{module}: LoRA on the router is not supported"
    if leaf == "embed_tokens":
        return f"{module}: LoRA on the token embedding is not supported"
    layout = next((text for regex, text in _OTHER_LAYOUTS if regex.search(f"{module}.lora_A")), None)
    if layout:
        return f"{module}: {layout}, which is not supported yet"
    if leaf == "q_proj":
        return f"{module}: the base has q_a_proj and q_b_proj instead; adapter of V2-Lite or Moonlight?"
    if leaf in ("q_a_proj", "q_b_proj"):
        return f"{module}: the base has q_proj instead; adapter of a base with q_lora_rank (V3, V2, K2)?"
    if leaf in ("k_proj", "v_proj", "qkv_proj"):
        return f"{module}: no such module; adapter of another architecture, not of a DeepSeek MoE model?"
    if ".mlp." in module and layer in targets.experts:
        return f"{module}: layer {layer} has routed experts, not a dense MLP of this name"
    return f"{module}: the base has no such module"


def explain_hidden(found: int, wanted: int) -> str:
    """A clause for a mismatch in hidden size, naming known models of the size found."""
    if found == wanted or not models_with_hidden(found):
        return ""
    return f"; looks like it was trained on a base with hidden {found}{models_with_hidden(found)}"
