"""What lies in the output folder of a run."""

from __future__ import annotations

CHECKPOINTS, ADAPTER, BEST_ADAPTER, CURVE = "checkpoints", "adapter", "adapter-best", "loss.png"
