"""Adapters in layouts of other programs, served: logits equal transformers with the weights merged by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from runtime.config import EngineConfig
from runtime.engine.scoring import score
from tests.conftest import RecordNumber
from tests.loaders.formats import layouts
from tests.loaders.formats.layouts import LAYOUTS, Written
from tests.oracle.adapters import merge_by_hand
from tests.oracle.base_models import Oracle, logits
from tests.oracle.driver import driven_engine
from tests.oracle.shapes import V3, VOCAB_SIZE, Shape

LOGITS_TOLERANCE = 1e-4
LEAST_EFFECT = 0.05
SERVED = (
    "SGLang shared-outer factors",
    "Tinker stacks (w1, w2, w3)",
    "NeMo Automodel grouped experts",
    "PEFT ParamWrapper stacks, 0.18",
    "PEFT ParamWrapper stacks, Unsloth's mark",
)


def draw_for_v3(monkeypatch: pytest.MonkeyPatch, name: str) -> Written:
    """The layout in the widths of the tiny V3, small enough to leave the logits in their range."""
    hidden, width = V3.config["hidden_size"], V3.config["moe_intermediate_size"]
    sizes = {"EXPERTS": V3.config["n_routed_experts"], "HIDDEN": hidden, "INTERMEDIATE": width, "SCALE": 0.1}
    sizes |= {"WIDTHS": {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}}
    for key, value in (sizes | {"HEAD": (VOCAB_SIZE, hidden)}).items():
        monkeypatch.setattr(layouts, key, value)
    return LAYOUTS[name]()


@pytest.mark.parametrize("name", SERVED)
def test_an_adapter_of_another_layout_is_served_as_what_it_means(
    name: str,
    oracle: Callable[[Shape], Oracle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_number: RecordNumber,
) -> None:
    written, base = draw_for_v3(monkeypatch, name), oracle(V3)
    save_file(written.tensors, tmp_path / "adapter_model.safetensors")
    settings = {"r": layouts.RANK, "lora_alpha": 0.1 * layouts.RANK} | written.config
    (tmp_path / "adapter_config.json").write_text(layouts.as_json(settings))
    deltas = {key.removesuffix(".weight"): delta for key, delta in written.deltas.items()}
    changed, prompt = merge_by_hand(base.model, deltas), base.prompt(40)
    expected = logits(changed, prompt)
    assert (expected - logits(base.model, prompt)).abs().max() > LEAST_EFFECT
    config = EngineConfig(base.path, dtype="float32", max_model_len=64, kv_cache_tokens=128, adapter_memory_gib=0.1)
    with driven_engine(config) as driver:
        driver.load("other", tmp_path)
        difference = (score(driver.engine, prompt, "other").float() - expected).abs().max().item()
    record_number(f"V3: {name}, logits vs merged by hand", difference, at_most=LOGITS_TOLERANCE)
