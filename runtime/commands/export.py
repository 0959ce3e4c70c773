"""`graft export`: an adapter in the layout that other programs read, or merged into its base."""

from __future__ import annotations

import argparse
import sys

from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.config import EXPORT_FORMATS
from runtime.trainer.export.adapter_files import ADAPTER_DTYPES, ExportOptions, export_notes, write_adapter
from runtime.trainer.export.card import merged_card, model_card
from runtime.trainer.export.merge import merge_into_base
from runtime.trainer.export.source import AdapterSource, read_source

MAX_REMARKS = 10
DEFAULT_DTYPE = "bfloat16"  # of adapters in a file, and of merged bases


def run(options: argparse.Namespace) -> int:
    """Write the folder, and say what it holds; nothing is left of a folder that could not be written whole."""
    for folder in (options.adapter, options.base):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
    base = DeepseekConfig.from_dir(options.base)
    targets = base.adapter_targets()
    source = read_source(options.adapter, base)
    if not (source.linears or source.experts):
        raise ValueError(f"{options.adapter}: every lora_B is zero, there is nothing to export")
    _print_remarks(source)
    if options.merge:
        _merge(options, source)
        return 0
    base_name = source.base_name or options.base.resolve().name
    dtype = ADAPTER_DTYPES[options.dtype or source.dtype or DEFAULT_DTYPE]
    export = ExportOptions(options.format or EXPORT_FORMATS[0], dtype, base_name)
    experts = source.with_idle_experts()
    notes = export_notes(source.linears, experts, targets, export)
    card = model_card(source.settings, source.metrics, notes, name=options.out.resolve().name, base_name=base_name)
    num_bytes = write_adapter(options.out, source.linears, experts, targets, export, card)
    sys.stdout.write("\n".join([f"{options.out}: {export.format}, {num_bytes:,} bytes", *notes]) + "\n")
    return 0


def _merge(options: argparse.Namespace, source: AdapterSource) -> None:
    base, adapter = source.base_name or options.base.resolve().name, options.adapter.resolve().name
    card = merged_card(options.out.resolve().name, base, adapter)
    dtype = options.dtype or DEFAULT_DTYPE
    report = merge_into_base(options.base, options.out, source.linears, source.experts, ADAPTER_DTYPES[dtype], card)
    sys.stdout.write(
        f"{options.out}: {options.base} with {report.num_changed} weights changed, {report.num_bytes:,} bytes in "
        f"{dtype}\n"
    )
    if report.num_dequantised:
        sys.stdout.write(
            f"{report.num_dequantised} fp8 weights are now {dtype}; their scales and quantization_config are left out\n"
        )


def _print_remarks(source: AdapterSource) -> None:
    hidden = len(source.remarks) - MAX_REMARKS
    for remark in source.remarks[:MAX_REMARKS]:
        sys.stderr.write(f"graft: {remark}\n")
    if hidden > 0:
        sys.stderr.write(f"graft: ... and {hidden} more remarks; `graft inspect` prints all of them\n")
