"""`graft inspect`: what an adapter would change in a base, read from the files alone."""

from __future__ import annotations

import argparse
import sys

from loaders.adapter import describe, load_adapter
from runtime.models.deepseek.config import DeepseekConfig


def run(options: argparse.Namespace) -> int:
    """Print modules, experts per layer, ranks, scales and bytes; a broken adapter is refused with all its problems."""
    for folder in (options.adapter, options.base):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
    targets = DeepseekConfig.from_dir(options.base).adapter_targets()
    sys.stdout.write(describe(load_adapter(options.adapter, targets), targets) + "\n")
    return 0
