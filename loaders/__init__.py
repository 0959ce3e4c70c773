"""Bytes on disk -> tensors: base checkpoints, fp8 dequantisation, adapter formats, tokenizer.

A leaf package: it imports nothing from `runtime`. Start at `base.plan_base` (base checkpoints), `adapter.load_adapter`
(LoRA adapters), `config_json.read_config` and `tokenizer.Tokenizer.from_dir`.
"""
