"""`graft demo`."""

from __future__ import annotations

import argparse

from runtime.demo.run import run_demo


def run(options: argparse.Namespace) -> int:
    """Run the bundled demonstration."""
    return run_demo()
