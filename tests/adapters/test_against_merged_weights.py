"""Adapters against the only definition that needs no LoRA code: transformers with the weights changed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from runtime.config import EngineConfig
from runtime.engine.scoring import score
from tests.conftest import RecordNumber
from tests.oracle.adapters import ATTENTION, KINDS, AdapterRecipe, kind_of, kinds_of, merge_by_hand, write_adapter
from tests.oracle.base_models import Oracle, logits
from tests.oracle.driver import Driver, driven_engine
from tests.oracle.shapes import MOONLIGHT, SHAPES, V2_LITE, V3, Shape

LOGITS_TOLERANCE = 1e-4
LEAST_EFFECT = 0.05  # an adapter that changes no logit by this much proves nothing
NUM_PROMPT_TOKENS = 150
NUM_NEW_TOKENS = 13

ALONE = [(V2_LITE if kind == "q_proj" else V3, (kind,)) for kind in KINDS]
TOGETHER = [(shape, KINDS) for shape in SHAPES]


@pytest.fixture(scope="module")
def driver_of(oracle: Callable[[Shape], Oracle]) -> Iterator[Callable[[Shape], Driver]]:
    """One engine per shape for all tests here; prompts run in chunks of 64."""
    drivers: dict[str, Driver] = {}
    with ExitStack() as engines:

        def get(shape: Shape) -> Driver:
            if shape.name not in drivers:
                config = EngineConfig(
                    oracle(shape).path,
                    dtype="float32",
                    max_model_len=256,
                    kv_cache_tokens=512,
                    max_batch_tokens=64,
                    adapter_memory_gib=0.1,
                )
                drivers[shape.name] = engines.enter_context(driven_engine(config))
            return drivers[shape.name]

        yield get


def _compare(driver: Driver, base: Oracle, changed: nn.Module, adapter: str) -> float:
    """Largest difference of logits over a chunked prompt and the decode steps after it."""
    prompt = base.prompt(NUM_PROMPT_TOKENS)
    outcome = driver.generate(prompt, adapter=adapter, max_new_tokens=NUM_NEW_TOKENS)
    assert outcome.failure is None, outcome.failure
    expected = logits(changed, prompt + outcome.tokens[:-1])
    plain = logits(base.model, prompt + outcome.tokens[:-1])
    for part in (slice(0, len(prompt)), slice(len(prompt), None)):
        assert (expected[part] - plain[part]).abs().max() > LEAST_EFFECT
    prefill = score(driver.engine, prompt, adapter).float() - expected[: len(prompt)]
    decode = torch.stack(outcome.logits) - expected[len(prompt) - 1 :]
    return max(prefill.abs().max().item(), decode.abs().max().item())


def test_every_kind_of_module_of_every_shape_is_covered(oracle: Callable[[Shape], Oracle]) -> None:
    assert {kind for shape in SHAPES for kind in kinds_of(oracle(shape))} == set(KINDS)


@pytest.mark.parametrize(("shape", "kinds"), ALONE, ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_one_kind_of_module_alone_equals_merged_weights(
    shape: Shape,
    kinds: tuple[str, ...],
    oracle: Callable[[Shape], Oracle],
    driver_of: Callable[[Shape], Driver],
    tmp_path: Path,
    record_number: RecordNumber,
) -> None:
    base, name = oracle(shape), kinds[0]
    adapter = write_adapter(base.path, tmp_path / name, AdapterRecipe(kinds, lora_rank=8, alpha=12.0, seed=1))
    assert {kind_of(module) for module in adapter.deltas} == set(kinds)
    driver_of(shape).load(name, adapter.path)
    difference = _compare(driver_of(shape), base, merge_by_hand(base.model, adapter.deltas), name)
    record_number(f"{shape.name}: LoRA on {name}, logits vs merged by hand", difference, at_most=LOGITS_TOLERANCE)


ALL_MODULES = {
    "one rank": AdapterRecipe(KINDS, lora_rank=16, alpha=16.0, seed=2),
    "mixed ranks, patterns, rsLoRA, half of the experts": AdapterRecipe(
        KINDS,
        lora_rank=8,
        alpha=4.0,
        use_rslora=True,
        seed=3,
        dtype=torch.bfloat16,
        rank_pattern={"o_proj": 3, "kv_b_proj": 24, r"mlp\.experts\.\d*[02468]\.gate_proj": 5, "lm_head": 12},
        alpha_pattern={"q_proj": 2.0, "kv_b_proj": 6.0, r"mlp\.experts\.1\.down_proj": 9.0},
        covers=lambda layer, expert: (layer + expert) % 2 == 0,
    ),
}


@pytest.mark.parametrize("recipe", ALL_MODULES.values(), ids=ALL_MODULES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_all_modules_together_equal_merged_weights(
    shape: Shape,
    recipe: AdapterRecipe,
    oracle: Callable[[Shape], Oracle],
    driver_of: Callable[[Shape], Driver],
    tmp_path: Path,
    record_number: RecordNumber,
) -> None:
    base, name = oracle(shape), f"all-{recipe.seed}"
    adapter = write_adapter(base.path, tmp_path / name, recipe)
    assert {kind_of(module) for module in adapter.deltas} == set(kinds_of(base))
    driver_of(shape).load(name, adapter.path)
    difference = _compare(driver_of(shape), base, merge_by_hand(base.model, adapter.deltas), name)
    record_number(
        f"{shape.name}: LoRA on all modules (seed {recipe.seed}), logits vs merged by hand",
        difference,
        at_most=LOGITS_TOLERANCE,
    )


@pytest.mark.parametrize("shape", (V3, V2_LITE, MOONLIGHT), ids=lambda shape: shape.name)
def test_an_adapter_saved_by_peft_equals_peft(
    shape: Shape,
    oracle: Callable[[Shape], Oracle],
    driver_of: Callable[[Shape], Driver],
    tmp_path: Path,
    record_number: RecordNumber,
) -> None:
    """Attention and routed experts, trained form: PEFT targets the fused expert parameters (`target_parameters`)."""
    base = oracle(shape)
    attention = [kind for kind in kinds_of(base) if kind in ATTENTION]
    config = LoraConfig(
        r=8,
        lora_alpha=6,
        target_modules=attention,
        rank_pattern={"o_proj": 4},
        task_type="CAUSAL_LM",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(shape.seed)
        model = get_peft_model(copy.deepcopy(base.model), config).eval()
    model.save_pretrained(tmp_path / "peft")
    driver_of(shape).load("peft", tmp_path / "peft")
    difference = _compare(driver_of(shape), base, model, "peft")
    record_number(
        f"{shape.name}: attention + experts saved by PEFT, logits vs PEFT", difference, at_most=LOGITS_TOLERANCE
    )


@pytest.mark.parametrize("shape", (V3, MOONLIGHT), ids=lambda shape: shape.name)
def test_a_per_expert_adapter_equals_what_peft_reads_from_it(
    shape: Shape,
    oracle: Callable[[Shape], Oracle],
    driver_of: Callable[[Shape], Driver],
    tmp_path: Path,
    record_number: RecordNumber,
) -> None:
    base = oracle(shape)
    recipe = AdapterRecipe((*ATTENTION, "routed_experts"), lora_rank=8, alpha=8.0, seed=4)
    adapter = write_adapter(base.path, tmp_path / "two-d", recipe)
    model = PeftModel.from_pretrained(copy.deepcopy(base.model), adapter.path).eval()
    driver_of(shape).load("two-d", adapter.path)
    difference = _compare(driver_of(shape), base, model, "two-d")
    record_number(f"{shape.name}: per-expert file, logits vs PEFT reading it", difference, at_most=LOGITS_TOLERANCE)
