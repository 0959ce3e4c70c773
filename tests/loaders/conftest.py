"""Fixtures of the loader tests; the builders they use stand in loader_builders.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the builders, whatever import mode pytest runs in

from loader_builders import TinyModel, save_tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """The tiny model on disk; tests must not change the directory."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))
