"""`graft inspect`: what an adapter would change in a base, read from the files alone."""

from __future__ import annotations

import argparse
import sys

from loaders.adapter import describe, load_adapter
from loaders.replacement_experts import describe_replacement, is_esft, load_replacement_experts
from runtime.models.deepseek.config import DeepseekConfig


def run(options: argparse.Namespace) -> int:
    """Print modules, experts per layer, ranks, scales and bytes; a broken adapter is refused with all its problems."""
    for folder in (options.adapter, options.base):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
    targets = DeepseekConfig.from_dir(options.base).adapter_targets()
    if is_esft(options.adapter):
        text = describe_replacement(load_replacement_experts(options.adapter, targets), targets)
    else:
        text = describe(load_adapter(options.adapter, targets, writer=options.format_hint), targets)
    sys.stdout.write(text + "\n")
    return 0
