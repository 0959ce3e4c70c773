"""ESFT adapters (DeepSeek's expert-specialised fine-tuning): full weights of chosen experts, not LoRA.

`expert_cfg.json` names the experts by layer; safetensors files hold `model.layers.N.mlp.experts.K.gate_proj.weight`
[I, H], up the same, down [H, I]. Files of the first version leave out `model.`.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from loaders.adapter_explain import explain_hidden, no_experts
from loaders.adapter_folder import CONFIG_FILE, ESFT_CONFIG_FILE, AdapterFolder
from loaders.adapter_names import plain_key
from loaders.adapter_types import AdapterTargets, ExpertShape, ExpertWeights, ReplacementExperts
from loaders.errors import AdapterError
from loaders.safetensors_file import StoredTensor

_KEY = re.compile(r"^model\.layers\.(0|[1-9][0-9]*)\.mlp\.experts\.(0|[1-9][0-9]*)\.(gate|up|down)_proj\.weight$")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INDEX = re.compile(r"0|[1-9][0-9]{0,5}")
_MAX_PROBLEMS = 1000
Place = tuple[int, int, str]  # layer, expert, projection


def is_esft(path: Path) -> bool:
    """Whether the directory is an ESFT adapter: it has ESFT's configuration, and none of a LoRA adapter."""
    return (Path(path) / ESFT_CONFIG_FILE).is_file() and not (Path(path) / CONFIG_FILE).is_file()


def most_experts_of_a_layer(path: Path) -> int:
    """How many experts the ESFT directory `path` replaces in the layer where it replaces most; AdapterError."""
    with AdapterFolder(path, None, ESFT_CONFIG_FILE) as folder:
        layers = folder.config.get("experts")
    by_layer = layers.values() if isinstance(layers, dict) else ()
    return max((len(experts) for experts in by_layer if isinstance(experts, list)), default=0)


def load_replacement_experts(
    path: Path, targets: AdapterTargets, *, max_bytes: int | None = None, max_experts_per_layer: int | None = None
) -> ReplacementExperts:
    """Load the ESFT directory `path`; weights are on CPU in their stored dtype.

    Raises AdapterError with every problem: each key is an expert's weight of the right shape that expert_cfg.json
    names, and each expert that it names is whole. `max_experts_per_layer` is what a server has room for.
    """
    with AdapterFolder(path, max_bytes, ESFT_CONFIG_FILE) as folder:
        problems: list[str] = []
        chosen = set(_chosen(folder.config, targets, problems))
        if not (chosen or problems):
            problems.append(f"{ESFT_CONFIG_FILE}: experts must name at least one expert of a layer")
        places = _places(folder.tensors, targets, problems)
        found = {place[:2] for place in places.values()}
        for layer, expert in sorted(found - chosen):
            problems.append(f"layer {layer}: expert {expert} is in the files, but not in {ESFT_CONFIG_FILE}")
        present = set(places.values())
        for layer, expert in sorted(chosen):
            missing = [kind for kind in ("gate", "up", "down") if (layer, expert, kind) not in present]
            if missing:
                problems.append(f"layer {layer}: expert {expert} lacks {', '.join(f'{k}_proj' for k in missing)}")
        _refuse(folder.path, problems)
        if max_experts_per_layer is not None:
            _require_room(folder.path, chosen, max_experts_per_layer)
        contents = folder.read(folder.runs(set(places)))
        digest, config, skipped = folder.digest, folder.config, tuple(folder.skipped)
    _refuse(path, contents.problems)
    tensors = contents.tensors
    parts: dict[int, dict[int, dict[str, torch.Tensor]]] = {}
    for key, (layer, expert, kind) in sorted(places.items(), key=lambda item: item[1]):
        parts.setdefault(layer, {}).setdefault(expert, {})[kind] = tensors[key]
    experts = {layer: {expert: ExpertWeights(**own) for expert, own in found.items()} for layer, found in parts.items()}
    return ReplacementExperts(experts, digest, config, skipped, sum(tensor.nbytes for tensor in tensors.values()))


def describe_replacement(weights: ReplacementExperts, targets: AdapterTargets) -> str:
    """The text of `graft inspect` for an ESFT adapter."""
    lines = ["layout     ESFT, full weights of chosen experts", f"evidence   {ESFT_CONFIG_FILE} in the folder",
             f"digest     {weights.digest}", f"bytes      {weights.num_bytes:,}", "", "replaced experts:"]  # fmt: skip
    for layer, experts in weights.experts.items():
        of_all = f"{len(experts)} of {targets.experts[layer].num_experts}"
        lines.append(f"  layer {layer}  {of_all}  {','.join(map(str, experts))}")
    lines += ["", "skipped:", *(f"  {name}  {reason}" for name, reason in weights.skipped)] if weights.skipped else []
    return "\n".join(lines)


def _chosen(config: Mapping[str, Any], targets: AdapterTargets, problems: list[str]) -> Iterator[tuple[int, int]]:
    """(layer, expert) of everything that expert_cfg.json names; what is wrong in it is added to `problems`."""
    for key, value in config.items():
        if key in ("shared_experts", "non_expert_modules") and value not in (False, None):
            problems.append(f"{ESFT_CONFIG_FILE}: {key} is set: only routed experts can be replaced")
        elif key not in ("experts", "shared_experts", "non_expert_modules"):
            problems.append(f"{ESFT_CONFIG_FILE}: {key[:40]!r} is a setting this loader does not know")
    layers = config.get("experts")
    if not isinstance(layers, dict) or not layers:
        problems.append(f"{ESFT_CONFIG_FILE}: experts must name at least one expert of a layer")
        return
    for name, experts in layers.items():
        layer = int(name) if _INDEX.fullmatch(name) else None
        shape = targets.experts.get(layer) if layer is not None else None
        if layer is None or shape is None:
            problems.append(f"{ESFT_CONFIG_FILE}: experts: layer {name[:40]!r} of the base has no routed experts")
        elif not isinstance(experts, list) or not all(type(e) is int and 0 <= e < shape.num_experts for e in experts):
            problems.append(
                f"{ESFT_CONFIG_FILE}: experts of layer {layer} must be indices from 0 to {shape.num_experts - 1}"
            )
        else:
            yield from ((layer, expert) for expert in experts)


def _require_room(path: Path, chosen: set[tuple[int, int]], room: int) -> None:
    layer, count = max(Counter(layer for layer, _ in chosen).items(), key=lambda item: item[1])
    if count > room:
        raise AdapterError(
            f"{path}: an ESFT adapter that replaces {count} experts of layer {layer}, and this server has room for "
            f"{room or 'none'} in a layer: start it with --replacement-experts {count} or more"
        )


def _places(
    tensors: tuple[StoredTensor, ...], targets: AdapterTargets, problems: list[str]
) -> dict[str, Place]:
    """Key -> place of every weight that fits the base."""
    result: dict[str, Place] = {}
    taken: dict[Place, str] = {}
    for stored in tensors:
        key = stored.name
        match = _KEY.match(plain_key(key))
        if match is None:
            problems.append(f"{key}: not a weight of a routed expert")
            continue
        place = (int(match[1]), int(match[2]), match[3])
        shape = targets.experts.get(place[0])
        if stored.dtype not in _DTYPES:
            problems.append(f"{key}: stored as {stored.dtype_name}, only F32, F16 and BF16 are supported")
        elif shape is None:
            problems.append(no_experts(key, place[0]))
        elif place[1] >= shape.num_experts:
            problems.append(f"{key}: the base has {shape.num_experts} experts")
        elif stored.shape != shape.dims(place[2]):
            problems.append(_misshaped(key, stored.shape, place[2], shape))
        elif place in taken:
            problems.append(f"{key}: duplicate, {taken[place]} names the same weight")
        else:
            result[key] = place
            taken[place] = key
    return result


def _misshaped(key: str, found: tuple[int, ...], kind: str, shape: ExpertShape) -> str:
    hidden = found[0 if kind == "down" else -1] if found else shape.hidden
    return f"{key}: shape {list(found)}, the base has {list(shape.dims(kind))}{explain_hidden(hidden, shape.hidden)}"


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        raise AdapterError(f"{path}: ESFT adapter refused, {len(problems)} {noun}", problems[:_MAX_PROBLEMS])
