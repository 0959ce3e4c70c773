"""ESFT adapters in an engine: whole experts in place of the base's, for the tokens of their own requests only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from runtime.config import EngineConfig
from runtime.engine.messages import CallId, LoadAdapter, RequestId
from runtime.engine.start import check_replacement_experts
from runtime.errors import ErrorKind
from runtime.models.deepseek.config import DeepseekConfig
from tests.conftest import RecordNumber
from tests.oracle.adapters import KINDS, AdapterRecipe, RandomAdapter, merge_by_hand, write_adapter
from tests.oracle.base_models import Oracle, logits
from tests.oracle.driver import Driver, driven_engine
from tests.oracle.replacement_experts import RandomReplacement, moe_layers, replace_by_hand, write_replacement
from tests.oracle.shapes import SHAPES, V3, Shape

LOGITS_TOLERANCE = 1e-4
LEAST_EFFECT = 0.05  # an adapter that changes no logit by this much proves nothing
NUM_NEW_TOKENS = 9
ROOM = 7
LORA = {
    "lora": AdapterRecipe(KINDS, lora_rank=8, alpha=12.0, seed=1),
    "few": AdapterRecipe(("routed_experts",), lora_rank=24, seed=2, covers=lambda layer, expert: expert % 3 == 0),
    "last": AdapterRecipe(("routed_experts",), lora_rank=8, seed=3, covers=lambda layer, expert: expert > 3),
}
# Requests of all of these run at once; the weights of a sum, or the adapter.
MIX: dict[str | None, dict[str, float]] = {
    "esft-a": {}, "lora": {"lora": 1.0}, "esft-b": {}, None: {}, "few": {"few": 1.0}, "last": {"last": 1.0},
    "0.7*lora+0.3*few": {"lora": 0.7, "few": 0.3}, "esft-half": {},
}  # fmt: skip


def _chosen(layers: list[int]) -> dict[str, dict[int, list[int]]]:
    """Experts that overlap between adapters, all layers and one, few and as many as there is room for."""
    return {
        "esft-a": {layer: [(layer + step) % 8 for step in (0, 3)] for layer in layers},
        "esft-b": {layer: [7, layer % 4, 4] for layer in layers[1:]},
        "esft-half": {layers[-1]: [0, 1]},
    }


@dataclass
class Case:
    """A base with LoRA and ESFT adapters, and an engine in which they are loaded."""

    base: Oracle
    lora: dict[str, RandomAdapter]
    replacements: dict[str, RandomReplacement]
    driver: Driver

    def model(self, adapter: str | None) -> torch.nn.Module:
        if adapter is None:
            return self.base.model
        if adapter in self.replacements:
            return replace_by_hand(self.base.model, self.replacements[adapter])
        deltas: dict[str, torch.Tensor] = {}
        for name, weight in MIX[adapter].items():
            for module, delta in self.lora[name].deltas.items():
                deltas[module] = deltas.get(module, torch.zeros_like(delta)) + weight * delta
        return merge_by_hand(self.base.model, deltas)

    def difference(self, request_id: RequestId, prompt: list[int], model: torch.nn.Module) -> float:
        """The largest difference between a request's logits and those of a model."""
        outcome = self.driver.outcomes[request_id]
        assert outcome.failure is None, outcome.failure
        expected = logits(model, prompt + outcome.tokens[:-1])[len(prompt) - 1 :]
        if model is not self.base.model:
            plain = logits(self.base.model, prompt + outcome.tokens[:-1])[len(prompt) - 1 :]
            assert (expected - plain).abs().max() > LEAST_EFFECT
        return (torch.stack(outcome.logits) - expected).abs().max().item()


def _config(base: Oracle, **settings: object) -> EngineConfig:
    sizes = {"max_model_len": 256, "kv_cache_tokens": 2048, "max_batch_tokens": 64, "adapter_memory_gib": 0.2}
    return EngineConfig(base.path, **{"dtype": "float32", "replacement_experts": ROOM, **sizes, **settings})  # type: ignore[arg-type]


def _case(base: Oracle, folder: Path, **settings: object) -> Iterator[Case]:
    lora = {name: write_adapter(base.path, folder / name, recipe) for name, recipe in LORA.items()}
    replacements = {
        name: write_replacement(base.path, folder / name, chosen, seed=seed)
        for seed, (name, chosen) in enumerate(_chosen(moe_layers(base.path)).items())
    }
    with driven_engine(_config(base, **settings)) as driver:
        for name, adapter in (lora | replacements).items():
            driver.load(name, adapter.path)
        yield Case(base, lora, replacements, driver)


@pytest.fixture(params=SHAPES, ids=lambda shape: shape.name)
def case(request: pytest.FixtureRequest, oracle: Callable[[Shape], Oracle], tmp_path: Path) -> Iterator[Case]:
    yield from _case(oracle(request.param), tmp_path)


@pytest.fixture
def v3(oracle: Callable[[Shape], Oracle], tmp_path: Path) -> Iterator[Case]:
    yield from _case(oracle(V3), tmp_path)


def _mixed(case: Case) -> dict[RequestId, tuple[str | None, list[int]]]:
    """A request for each of the mix, prompts of different lengths, run to their ends."""
    asked = {}
    for place, adapter in enumerate(MIX):
        prompt = case.base.prompt(20 + 13 * place, seed=300 + place)
        asked[case.driver.add(prompt, adapter=adapter, max_new_tokens=NUM_NEW_TOKENS)] = (adapter, prompt)
    case.driver.run()
    return asked


def test_requests_equal_a_model_with_those_experts_replaced_in_a_batch_with_lora_sums_and_the_base(
    case: Case, record_number: RecordNumber
) -> None:
    """Prompts run in chunks of 64 tokens beside decodes of the others."""
    asked = _mixed(case)
    esft = [item for item in asked.items() if item[1][0] in case.replacements]
    others = [item for item in asked.items() if item not in esft]
    for text, items in (("ESFT", esft), ("the others", others)):
        worst = max(case.difference(number, prompt, case.model(name)) for number, (name, prompt) in items)
        name = f"{case.base.shape.name}: {text} in a batch with each other, logits vs transformers"
        record_number(name, worst, at_most=LOGITS_TOLERANCE)


def test_each_request_of_the_mix_gets_the_tokens_that_it_gets_alone(v3: Case) -> None:
    together = {name: v3.driver.outcomes[number].tokens for number, (name, _) in _mixed(v3).items()}
    for place, adapter in enumerate(MIX):
        prompt = v3.base.prompt(20 + 13 * place, seed=300 + place)
        alone = v3.driver.generate(prompt, adapter=adapter, max_new_tokens=NUM_NEW_TOKENS)
        assert alone.tokens == together[adapter], adapter
    assert len({tuple(tokens) for tokens in together.values()}) == len(MIX)


def test_batches_without_such_adapters_change_in_no_bit(v3: Case, record_number: RecordNumber) -> None:
    """Against an engine without room for them: the base alone, and the base with LoRA adapters."""
    prompts = [(name, v3.base.prompt(15 + 20 * place, seed=place)) for place, name in enumerate((None, "lora", "few"))]
    with driven_engine(_config(v3.base, replacement_experts=0)) as plain:
        assert plain.engine.ready.num_parameters == v3.driver.engine.ready.num_parameters
        for name, adapter in v3.lora.items():
            plain.load(name, adapter.path)
        different = 0
        for batch in (prompts[:1], prompts):
            seen = []
            for driver in (plain, v3.driver):
                ids = [driver.add(prompt, adapter=name, max_new_tokens=NUM_NEW_TOKENS) for name, prompt in batch]
                driver.run()
                seen.append([torch.stack(driver.outcomes[number].logits) for number in ids])
            different += sum(not torch.equal(a, b) for a, b in zip(*seen, strict=True))
    record_number("room for replacement experts: requests without them that differ in any bit", different, at_most=0)


def test_a_replacement_under_traffic_leaves_running_requests_the_old_experts_and_gives_new_ones_the_new(
    v3: Case, tmp_path: Path, record_number: RecordNumber
) -> None:
    layers = moe_layers(v3.base.path)
    newer = write_replacement(v3.base.path, tmp_path / "newer", {layer: [0, 5] for layer in layers}, seed=77)
    prompt = v3.base.prompt(30, seed=1)
    old = v3.driver.add(prompt, adapter="esft-a", max_new_tokens=40)
    while len(v3.driver.outcomes[old].tokens) < 5:
        v3.driver.step()
    replacing = CallId(10**6)
    v3.driver.engine.submit(LoadAdapter(replacing, "esft-a", str(newer.path), replace=True))
    while not v3.driver.answered(replacing):
        v3.driver.step()
    assert not v3.driver.outcomes[old].ended
    new = v3.driver.add(prompt, adapter="esft-a", max_new_tokens=NUM_NEW_TOKENS)
    v3.driver.run()
    differences = [
        v3.difference(old, prompt, v3.model("esft-a")),
        v3.difference(new, prompt, replace_by_hand(v3.base.model, newer)),
    ]
    record_number("ESFT replaced meanwhile, logits of both", max(differences), at_most=LOGITS_TOLERANCE)
    assert v3.driver.show("esft-a").num_expert_pages == 2 * len(layers)


def test_unloading_frees_the_experts_and_what_is_told_are_their_own_bytes(v3: Case) -> None:
    _mixed(v3)
    for name, replacement in v3.replacements.items():
        info = v3.driver.show(name)
        assert (info.device_bytes, info.host_bytes, info.tensor_bytes) == (replacement.num_bytes,) * 3
        assert info.num_expert_pages == len(replacement.weights) // 3
        assert {item.layer: item.num_experts for item in info.layers} == {
            layer: len(experts) for layer, experts in _chosen(moe_layers(v3.base.path))[name].items()
        }
        assert (info.lora_rank_max, info.target_modules) == (0, ["replaced_experts"])
    before = v3.driver.engine.stats().adapter_device_bytes
    for name, replacement in v3.replacements.items():
        v3.driver.unload(name)
        after = v3.driver.engine.stats().adapter_device_bytes
        assert before - after == replacement.num_bytes
        before = after
    for name in v3.lora:
        v3.driver.unload(name)
    v3.driver.step()
    stats = v3.driver.engine.stats()
    assert (stats.adapters_resident, stats.adapter_device_bytes, stats.adapter_host_bytes) == (0, 0, 0)
    assert v3.driver.engine.adapters.pages.spare.missing_layers(dict.fromkeys(moe_layers(v3.base.path), ROOM)) == []


def test_a_sum_with_one_is_refused_by_its_name_and_the_engine_goes_on(v3: Case) -> None:
    outcome = v3.driver.generate(v3.base.prompt(9), adapter="lora+0.5*esft-a")
    assert outcome.failure is not None and outcome.failure.kind is ErrorKind.FAILED_PRECONDITION
    assert "esft-a@" in outcome.failure.message and "cannot be a part of a sum" in outcome.failure.message
    assert v3.driver.generate(v3.base.prompt(9), adapter="esft-a").failure is None


def test_room_in_a_base_without_routed_experts_is_refused_at_the_start(oracle: Callable[[Shape], Oracle]) -> None:
    base = oracle(V3)
    model = DeepseekConfig.from_dir(base.path)
    check_replacement_experts(_config(base), model)
    dense = replace(model, first_k_dense_replace=model.num_hidden_layers)
    with pytest.raises(ValueError, match=f"replacement_experts = {ROOM}, but the base has no routed experts"):
        check_replacement_experts(_config(base), dense)
    with pytest.raises(ValueError, match=r"replacement_experts = -1 is out of range: 0\.\.10000"):
        _config(base, replacement_experts=-1).validate()


def test_more_adapters_than_there_is_room_for_take_turns(
    oracle: Callable[[Shape], Oracle], tmp_path: Path, record_number: RecordNumber
) -> None:
    """Four ESFT adapters of three experts a layer, room for seven, all asked for at once beside LoRA and the base."""
    base = oracle(V3)
    layers = moe_layers(base.path)
    adapters = {
        f"esft-{number}": write_replacement(
            base.path, tmp_path / str(number), {layer: [number, 3 + number, 9] for layer in layers}, seed=number
        )
        for number in range(4)
    }
    lora = write_adapter(base.path, tmp_path / "lora", LORA["few"])
    with driven_engine(_config(base, adapter_cycle_seconds=0.0, max_adapters=4)) as driver:
        for name, adapter in adapters.items():
            driver.load(name, adapter.path)
        driver.load("lora", lora.path)
        asked = {}
        for place in range(3):
            for name in [*adapters, "lora", None]:
                prompt = base.prompt(12 + 7 * place, seed=400 + place)
                asked[driver.add(prompt, adapter=name, max_new_tokens=30)] = (name, prompt)
        driver.run()
        case = Case(base, {"few": lora}, adapters, driver)
        models = {name: replace_by_hand(base.model, item) for name, item in adapters.items()}
        differences = [
            case.difference(number, prompt, models[name]) for number, (name, prompt) in asked.items() if name in models
        ]
        worst = max(differences)
        record_number("ESFT adapters that take turns, logits vs transformers", worst, at_most=LOGITS_TOLERANCE)
        assert all(driver.outcomes[number].failure is None for number in asked)
        evictions = driver.engine.stats().adapter_device_evictions
        record_number("ESFT adapters that took turns: evictions", evictions, at_least=2)
