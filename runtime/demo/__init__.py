"""The bundled model, its adapters and their tasks, and a run that shows them at work."""

from __future__ import annotations

from pathlib import Path

DEMO_DIR = Path(__file__).resolve().parent
MODEL_DIR = DEMO_DIR / "model"
ADAPTERS_DIR = DEMO_DIR / "adapters"
TASKS_DIR = DEMO_DIR / "tasks"
