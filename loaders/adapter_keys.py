"""All keys of an adapter: factors paired, and every key that cannot be used explained."""

import re
from dataclasses import dataclass, field
from typing import Literal

from loaders.adapter_names import layer_of, plain_key, split_factor
from loaders.adapter_types import AdapterTargets
from loaders.safetensors_file import StoredTensor

_EXPERT = re.compile(r"^(?P<experts>.+\.mlp\.experts)\.(?:0|[1-9][0-9]*)\.(?P<leaf>\w+)$")
_MEGATRON = re.compile(r"weight[12]_lora_[ab]$")
_MAX_MTP_LAYERS = 3
Side = Literal["A", "B"]
_OTHER: dict[str, Side] = {"A": "B", "B": "A"}


@dataclass(frozen=True)
class FactorPair:
    """The two factors of one module, as headers; `module` is the plain name.

    `shared` names the side that the file has once for all experts of the layer, None where both are the module's own.
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    shared: Side | None = None

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of lora_A in the file."""
        return self.a.shape

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Shape of lora_B in the file."""
        return self.b.shape


@dataclass
class SortedKeys:
    """All keys of an adapter: pairs to use, and what was skipped or is wrong."""

    pairs: list[FactorPair] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


Halves = dict[str, dict[str, StoredTensor]]


def sort_keys(tensors: tuple[StoredTensor, ...], targets: AdapterTargets) -> SortedKeys:
    """Split every key into module and side and pair A with B; nothing is left unaccounted for."""
    result = SortedKeys()
    plain_keys = [plain_key(tensor.name) for tensor in tensors]
    mtp_layers = _mtp_layers(plain_keys, targets)
    halves: Halves = {}
    for tensor, plain in zip(tensors, plain_keys, strict=True):
        key = tensor.name
        factor = split_factor(plain)
        if layer_of(plain) in mtp_layers:
            result.skipped.append((key, "belongs to a multi-token-prediction layer, which serving does not use"))
        elif factor is None:
            _sort_other(key, plain, tensor, targets, result)
        elif factor[1] in halves.setdefault(factor[0], {}):
            other = halves[factor[0]][factor[1]].name
            result.problems.append(f"{key}: duplicate, {other} names the same factor")
        else:
            halves[factor[0]][factor[1]] = tensor
    shared = _pair_with_shared(halves, result)
    for module, sides in halves.items():
        if module not in shared:
            _pair(module, sides, result)
    return result


def _pair_with_shared(halves: Halves, result: SortedKeys) -> set[str]:
    """Pair `experts.K.up_proj` that has one side with the other side of `experts.up_proj`; returns what is done."""
    done: set[str] = set()
    for module, sides in halves.items():
        match = _EXPERT.match(module)
        if match is None or len(sides) != 1:
            continue
        own = next(iter(sides))
        outer = f"{match['experts']}.{match['leaf']}"
        if halves.get(outer, {}).keys() == {_OTHER[own]}:
            both = sides | halves[outer]
            result.pairs.append(FactorPair(module, both["A"], both["B"], shared=_OTHER[own]))
            done |= {module, outer}
    return done


def _pair(module: str, sides: dict[str, StoredTensor], result: SortedKeys) -> None:
    if len(sides) < 2:
        found, missing = ("lora_A", "lora_B") if "A" in sides else ("lora_B", "lora_A")
        result.problems.append(f"{module}: has {found} but no {missing}")
        return
    pair = FactorPair(module, sides["A"], sides["B"])
    if pair.a.num_bytes == 0 and pair.b.num_bytes == 0:
        for tensor in (pair.a, pair.b):
            result.skipped.append((tensor.name, "empty tensor, a placeholder without effect"))
    else:
        result.pairs.append(pair)


def _mtp_layers(plain_keys: list[str], targets: AdapterTargets) -> set[int | None]:
    """Layer indices just past the base's last layer; many of them mean another base, not prediction layers."""
    layers = {layer_of(plain) for plain in plain_keys}
    beyond = {layer for layer in layers if layer is not None and layer >= targets.num_hidden_layers}
    allowed = set(range(targets.num_hidden_layers, targets.num_hidden_layers + _MAX_MTP_LAYERS))
    return set(beyond) if beyond <= allowed else set()


def _sort_other(key: str, plain: str, tensor: StoredTensor, targets: AdapterTargets, result: SortedKeys) -> None:
    shape = list(tensor.shape)
    if plain.endswith(".base_layer.weight"):
        module = plain.removesuffix(".base_layer.weight")
        expected = targets.linears.get(module)
        if expected is None or tensor.shape == expected:
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
    elif _MEGATRON.search(plain):
        result.problems.append(
            f"{key}: a factor of MindSpeed-LLM's grouped experts; convert its mp_rank_* folders with `graft convert`"
        )
    elif plain.endswith(".weight"):
        result.problems.append(f"{key}: a full weight {shape} (modules_to_save?), only LoRA factors are supported")
    else:
        result.problems.append(f"{key}: not a LoRA key this loader knows")
