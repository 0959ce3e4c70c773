"""An adapter costs the device what its own expert tensors weigh, also if it has few of the experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runtime.config import EngineConfig
from tests.conftest import RecordNumber
from tests.oracle.adapters import AdapterRecipe, write_adapter
from tests.oracle.base_models import Oracle
from tests.oracle.driver import driven_engine
from tests.oracle.shapes import V3, Shape

COVERAGE: dict[str, Callable[[int, int], bool]] = {
    "all experts": lambda layer, expert: True,
    "10 % of the experts": lambda layer, expert: (layer, expert) in {(1, 3), (1, 12), (2, 7)},
}


@pytest.mark.parametrize("lora_rank", (8, 16, 64))
@pytest.mark.parametrize("coverage", COVERAGE)
def test_expert_pages_take_the_bytes_of_the_adapters_own_tensors(
    coverage: str,
    lora_rank: int,
    oracle: Callable[[Shape], Oracle],
    tmp_path: Path,
    record_number: RecordNumber,
) -> None:
    base = oracle(V3)
    recipe = AdapterRecipe(("routed_experts",), lora_rank=lora_rank, covers=COVERAGE[coverage], dtype=torch.bfloat16)
    adapter = write_adapter(base.path, tmp_path / "adapter", recipe)
    own_bytes = adapter.num_tensor_elements * torch.bfloat16.itemsize
    config = EngineConfig(base.path, dtype="bfloat16", max_model_len=256, kv_cache_tokens=256, adapter_memory_gib=0.05)
    with driven_engine(config) as driver:
        driver.load("adapter", adapter.path)
        assert driver.generate(base.prompt(4), adapter="adapter", max_new_tokens=2).failure is None
        info = driver.show("adapter")
        assert driver.stats.adapter_device_bytes == info.device_bytes
    assert info.num_expert_pages == len(adapter.deltas) // 3
    record_number(
        f"rank {lora_rank}, {coverage}: device bytes / own tensors' bytes",
        info.device_bytes / own_bytes,
        at_least=1.0,
        at_most=1.1,
    )
