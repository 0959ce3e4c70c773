"""LoRA factors in the per-rank checkpoints of Megatron and MindSpeed-LLM."""

from loaders.megatron.load import MegatronSettings, is_megatron, load_megatron

__all__ = ["MegatronSettings", "is_megatron", "load_megatron"]
