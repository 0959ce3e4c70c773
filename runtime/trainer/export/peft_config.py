"""adapter_config.json of an exported adapter, without the settings that its readers understand differently."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loaders.adapter_types import AdapterTargets
from runtime.trainer.export.layouts import Experts, Linears, adapted_stacks, gate_and_up_share_a
from runtime.trainer.export.uniform import Uniform

# Readers choose the order of stacked factors by the version that wrote them: PEFT below 0.19 swapped in and out.
PEFT_VERSION = "0.21.2"


def per_expert_config(
    linears: Linears, experts: Experts, targets: AdapterTargets, uniform: Uniform, base_name: str | None
) -> dict[str, Any]:
    """The config of one pair per expert.

    On transformers 5 PEFT turns gate_proj, up_proj and down_proj into the stacks of routed experts and forgets shared
    and dense MLPs of the same names, unless `target_parameters` names their weights.
    """
    stacks = adapted_stacks(experts)
    modules = _attention_and_head(linears, targets)
    modules += ["gate_proj", "up_proj"] if "gate_up_proj" in stacks else []
    modules += ["down_proj"] if "down_proj" in stacks else []
    return _config(uniform, base_name, modules, _mlp_weights(linears, targets))


def stacked_config(
    linears: Linears, experts: Experts, targets: AdapterTargets, uniform: Uniform, base_name: str | None
) -> dict[str, Any]:
    """The config of ParamWrapper stacks; gate_up has its own rank where gate and up do not share A."""
    stacks = adapted_stacks(experts)
    parameters = [f"mlp.experts.{stack}" for stack in stacks] + _mlp_weights(linears, targets)
    config = _config(uniform, base_name, _attention_and_head(linears, targets), parameters)
    if "gate_up_proj" in stacks and not gate_and_up_share_a(experts):
        config["rank_pattern"] = {"mlp.experts.gate_up_proj": 2 * uniform.lora_rank}
        config["alpha_pattern"] = {"mlp.experts.gate_up_proj": 2 * uniform.alpha}
    return config


def _config(uniform: Uniform, base_name: str | None, modules: list[str], parameters: list[str]) -> dict[str, Any]:
    alpha = uniform.alpha
    return {
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": uniform.lora_rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        # Readers disagree on rsLoRA for experts: alpha is written so that alpha / r is the scale.
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": modules,
        "target_parameters": parameters or None,
    }


def _attention_and_head(linears: Linears, targets: AdapterTargets) -> list[str]:
    return _short_names((name for name in linears if ".mlp." not in name), targets)


def _mlp_weights(linears: Linears, targets: AdapterTargets) -> list[str]:
    """Weights of shared and dense MLPs, e.g. `shared_experts.up_proj.weight` and `mlp.up_proj.weight`."""
    return [f"{name}.weight" for name in _short_names((name for name in linears if ".mlp." in name), targets)]


def _short_names(names: Iterable[str], targets: AdapterTargets) -> list[str]:
    """The last part of a name where every layer's module of that name is meant, else the whole name."""
    chosen: dict[str, set[str]] = {}
    for name in names:
        chosen.setdefault(_ending(name), set()).add(name)
    result: list[str] = []
    for ending, group in sorted(chosen.items()):
        everywhere = {name for name in targets.linears if _ending(name) == ending}
        result += [ending] if group == everywhere else sorted(group)
    return result


def _ending(name: str) -> str:
    """`o_proj`, `lm_head`, `shared_experts.up_proj` or `mlp.up_proj`."""
    parts = name.split(".")
    return ".".join(parts[-2:] if "mlp" in parts else parts[-1:])
