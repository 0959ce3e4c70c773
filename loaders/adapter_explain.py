"""Why a key or a module of an adapter cannot be used, with the likely cause: sentences for refusals only."""

from loaders.adapter_names import layer_of
from loaders.adapter_types import AdapterTargets
from loaders.family import models_with_hidden


def explain_unknown(module: str, targets: AdapterTargets) -> str:
    """Why a LoRA on `module` cannot be applied to this base."""
    layer = layer_of(module)
    leaf = module.rsplit(".", 1)[-1]
    if layer is not None and layer >= targets.num_hidden_layers:
        return f"{module}: the base has only {targets.num_hidden_layers} layers; trained on a larger base?"
    if module.endswith((".mlp.gate", ".block_sparse_moe.gate")):
        return f"{module}: LoRA on the router is not supported"
    if leaf == "embed_tokens":
        return f"{module}: LoRA on the token embedding is not supported"
    if ".block_sparse_moe." in module:
        return f"{module}: Mixtral-style names, but not of one expert's w1, w2 or w3"
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


def no_experts(module: str, layer: int) -> str:
    """A LoRA on experts of a layer that has none."""
    return f"{module}: layer {layer} of the base has no routed experts"
