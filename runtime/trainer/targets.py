"""Which modules are adapted: names as users write them (Hugging Face's, Megatron's, parts, globs) -> their LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.config import LoraSettings, ModuleLora
from runtime.trainer.config_file import ConfigError
from runtime.trainer.dropout import make_dropout
from runtime.trainer.lora import LoraSpec

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"
HEAD = "lm_head"
_MLP = ("mlp.{}", "mlp.shared_experts.{}")
# Megatron's names. linear_fc1 and linear_fc2 are those of dense and shared MLPs; routed experts are `experts`.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "linear_q_proj": ("q_proj",),
    "linear_qa": ("q_a_proj",),
    "linear_qb": ("q_b_proj", "q_proj"),
    "linear_kva": ("kv_a_proj_with_mqa",),
    "linear_kvb": ("kv_b_proj",),
    "linear_qkv": ("q_a_proj", "q_proj", "kv_a_proj_with_mqa"),
    "linear_proj": ("o_proj",),
    "linear_fc1": tuple(part.format(leaf) for part in _MLP for leaf in ("gate_proj", "up_proj")),
    "linear_fc2": tuple(part.format("down_proj") for part in _MLP),
    "output_layer": ("lm_head",),
}
# By the last part of a name.
_NEVER = {
    "gate": "the router is frozen",
    "router": "the router is frozen",
    "embed_tokens": "embeddings are frozen",
    "word_embeddings": "embeddings are frozen",
}


def resolve_targets(config: DeepseekConfig, lora: LoraSettings, seed: int) -> dict[str, LoraSpec]:
    """Full module name -> its LoRA; routed experts of a layer are one module, `model.layers.N.mlp.experts`.

    Raises ConfigError for a name that fits no module, a pattern that fits no target, a part of the experts'
    projections, and for nothing at all.
    """
    modules = list(module_names(config))
    chosen: set[str] = set()
    for target in lora.targets:
        found = _matching(target, modules)
        if not found:
            raise ConfigError(f"lora.targets: {_unknown(target, modules)}")
        chosen |= found
    for pattern in lora.patterns:
        found = _matching(pattern, modules)
        if not found:
            raise ConfigError(f"lora.patterns: {_unknown(pattern, modules)}")
        if not found & chosen:
            raise ConfigError(
                f"lora.patterns: {pattern!r} fits no module of lora.targets ({', '.join(lora.targets)}), so it would "
                "change nothing: add the module to lora.targets, or remove the pattern"
            )
    specs = {}
    for module in _whole_experts(chosen, modules):
        settings = _settings_of(module, lora)
        if settings.rank:
            specs[module] = _spec(module, settings, lora, seed)
    if not specs:
        raise ConfigError("lora: every target has rank 0, so there is nothing to train")
    return specs


def module_names(config: DeepseekConfig) -> Iterable[str]:
    """All modules that LoRA can adapt; routed experts as their three projections."""
    yield from config.linear_shapes()
    for layer in range(config.num_hidden_layers):
        if config.is_moe_layer(layer):
            yield from (f"model.layers.{layer}.mlp.experts.{leaf}" for leaf in EXPERT_PROJECTIONS)


def is_routed(module: str) -> bool:
    """Whether a name is that of routed experts, whole or one of their projections."""
    return ".mlp.experts" in module


def module_of(factor: str) -> str:
    """The module of a factor's global name, an expert's or a linear's."""
    head, found, _ = factor.partition(".mlp.experts.")
    return f"{head}.mlp.experts" if found else factor.rpartition(".")[0]


def _spec(module: str, settings: ModuleLora, lora: LoraSettings, seed: int) -> LoraSpec:
    alpha = settings.rank if settings.alpha is None else settings.alpha
    scale = alpha / (math.sqrt(settings.rank) if lora.rslora else settings.rank)
    dropout_seed = seed if lora.dropout_seed is None else lora.dropout_seed
    return LoraSpec(settings.rank, scale, make_dropout(lora.dropout, dropout_seed, module))


def _settings_of(module: str, lora: LoraSettings) -> ModuleLora:
    """The first pattern that matches decides, as in PEFT; for routed experts it must match all their projections."""
    names = [f"{module}.{leaf}" for leaf in EXPERT_PROJECTIONS] if is_routed(module) else [module]
    for pattern, settings in lora.patterns.items():
        found = _matching(pattern, names)
        if len(found) == len(names):
            return settings
        if found:
            raise ConfigError(
                f"lora.patterns: {pattern!r} fits a part of {module}, but the projections of routed experts have one "
                "rank: name experts, or mlp.shared_experts.down_proj and the like to leave the routed experts alone"
            )
    return ModuleLora(lora.rank, lora.alpha)


def _matching(target: str, modules: list[str]) -> set[str]:
    if target == ALL_LINEAR:
        return set(modules) - {HEAD}  # as in PEFT, whose all-linear leaves the output layer out
    parts = ALIASES.get(target, (target,))
    return {module for module in modules if any(_matches(part, module) for part in parts)}


def _matches(pattern: str, module: str) -> bool:
    """Whether the dotted pattern, component by component with globs, occurs in the module's name."""
    wanted, given = pattern.split("."), module.split(".")
    return any(
        all(fnmatchcase(part, glob) for part, glob in zip(given[start:], wanted, strict=False))
        for start in range(len(given) - len(wanted) + 1)
    )


def _whole_experts(chosen: set[str], modules: list[str]) -> list[str]:
    """In the model's order, the experts' three projections joined into one module."""
    joined: dict[str, None] = {}
    for module in modules:
        if module not in chosen:
            continue
        if is_routed(module):
            experts = module.rpartition(".")[0]
            missing = [leaf for leaf in EXPERT_PROJECTIONS if f"{experts}.{leaf}" not in chosen]
            if missing:
                raise ConfigError(
                    f"lora.targets: routed experts are adapted as a whole, but {', '.join(missing)} is not named: "
                    "name experts (or gate_proj, up_proj and down_proj together), or mlp.shared_experts.gate_proj "
                    "and the like to leave the routed experts alone"
                )
            module = experts
        joined[module] = None
    return list(joined)


def _unknown(target: str, modules: list[str]) -> str:
    leaf = target.rpartition(".")[2]
    if leaf in _NEVER:
        return f"{target!r} cannot be trained: {_NEVER[leaf]}"
    leaves = sorted({module.rpartition(".")[2] for module in modules} | {"experts", "shared_experts", ALL_LINEAR})
    return f"{target!r} fits no module of this base; known are {', '.join(leaves)}, and {', '.join(ALIASES)}"
