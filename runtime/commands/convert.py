"""`graft convert`: an adapter in any layout that the loaders know, written as the standard per-expert file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from loaders.adapter import AdapterTargets, AdapterWeights, describe, load_adapter
from loaders.adapter_folder import CONFIG_FILE
from loaders.megatron import MegatronSettings, is_megatron, load_megatron
from loaders.replacement_experts import is_esft
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.export.adapter_files import ADAPTER_DTYPES, ExportOptions, export_notes, write_adapter
from runtime.trainer.export.card import model_card
from runtime.trainer.export.layouts import named_pairs
from runtime.trainer.export.source import MAX_LORA_RANK


def run(options: argparse.Namespace) -> int:
    """Print what was found and write the folder, whole or not at all."""
    for folder in (options.adapter, options.base):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
    targets = DeepseekConfig.from_dir(options.base).adapter_targets()
    weights = _load(options, targets)
    sys.stdout.write(describe(weights, targets) + "\n\n")
    if not (weights.linears or weights.experts):
        raise ValueError(f"{options.adapter}: every lora_B is zero, there is nothing to write")
    dtype = _widest(weights) if options.dtype == "auto" else ADAPTER_DTYPES[options.dtype]
    base_name = weights.config.get("base_model_name_or_path")
    base_name = base_name if isinstance(base_name, str) else options.base.resolve().name
    export = ExportOptions(dtype=dtype, base_name=base_name, metadata={"converted_from": weights.layout})
    notes = [f"Converted from: {weights.layout}.", *export_notes(weights.linears, weights.experts, targets, export)]
    card = model_card({}, {}, notes, name=options.output.resolve().name, base_name=base_name)
    num_bytes = write_adapter(options.output, weights.linears, weights.experts, targets, export, card)
    sys.stdout.write("\n".join([f"{options.output}: {export.format}, {num_bytes:,} bytes", *notes[1:]]) + "\n")
    return 0


def _load(options: argparse.Namespace, targets: AdapterTargets) -> AdapterWeights:
    """Read the adapter; an option that its kind of folder does not use is refused."""
    path: Path = options.adapter
    has_settings = options.rank is not None or options.alpha is not None
    if is_esft(path):
        raise ValueError(f"{path}: an ESFT adapter holds full weights of experts, which no LoRA file can express")
    if (path / CONFIG_FILE).is_file() or not is_megatron(path):
        if has_settings:
            raise ValueError("--rank and --alpha are for MindSpeed-LLM shards; other adapters state theirs themselves")
        return load_adapter(path, targets, max_lora_rank=MAX_LORA_RANK, writer=options.format_hint)
    if options.format_hint:
        raise ValueError("--format-hint is for flat stacks of experts, these are MindSpeed-LLM shards")
    if options.rank is None or options.alpha is None:
        raise ValueError(
            f"{path}: MindSpeed-LLM shards do not state rank and alpha: give --rank and --alpha as the training "
            "command had them (--lora-r, --lora-alpha)"
        )
    if not 1 <= options.rank <= MAX_LORA_RANK:
        raise ValueError(f"--rank {options.rank} is not allowed: 1 to {MAX_LORA_RANK}")
    if not 0 < options.alpha < 1e9:
        raise ValueError(f"--alpha {options.alpha:g} is not allowed: a positive number")
    return load_megatron(path, targets, MegatronSettings(options.rank, options.alpha))


def _widest(weights: AdapterWeights) -> torch.dtype:
    """The dtype that all factors have, or float32."""
    pairs = (pair for _, pair in named_pairs(weights.linears, weights.experts))
    dtypes = {factor.dtype for pair in pairs for factor in (pair.a, pair.b)}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
