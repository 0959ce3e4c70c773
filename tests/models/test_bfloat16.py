"""In bfloat16 two right programs differ, so errors are compared: ours and transformers', both against float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from runtime.config import EngineConfig
from runtime.engine.scoring import score
from tests.conftest import RecordNumber
from tests.oracle.base_models import Oracle, logits
from tests.oracle.driver import driven_engine
from tests.oracle.shapes import MOONLIGHT, V3, Shape

NUM_PROMPTS = 64
NUM_TOKENS = 64
NUM_DECODED = 16


@pytest.mark.parametrize("shape", [V3, MOONLIGHT], ids=lambda shape: shape.name)
def test_bfloat16_errs_no_more_than_transformers_does(
    shape: Shape, oracle: Callable[[Shape], Oracle], record_number: RecordNumber
) -> None:
    """Prefill and decode; a mean over many tokens, since a near tie in the router makes a single one jump."""
    base = oracle(shape)
    theirs_16 = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16).eval()
    config = EngineConfig(base.path, dtype="bfloat16", max_model_len=128, kv_cache_tokens=256, adapter_memory_gib=0.01)
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    with driven_engine(config) as driver:
        for seed in range(NUM_PROMPTS):
            prompt = base.prompt(NUM_TOKENS, seed=100 + seed)
            decoded = driver.generate(prompt, max_new_tokens=NUM_DECODED + 1)
            text = prompt + decoded.tokens[:-1]
            exact = logits(base.model, text)
            seen = torch.cat((score(driver.engine, prompt)[:-1], torch.stack(decoded.logits)))
            ours.append((seen - exact).abs())
            theirs.append((logits(theirs_16, text) - exact).abs())
    ratio = (torch.cat(ours).mean() / torch.cat(theirs).mean()).item()
    record_number(f"{shape.name}: bfloat16 error of logits / transformers' bfloat16 error", ratio, at_most=1.1)
