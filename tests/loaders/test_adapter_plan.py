"""Plans of adapters that say the same are remembered: each thing that a plan follows from is noticed when it changes.

What a load gives with a plan in memory is compared with what it gives when nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_builders import write_adapter
from safetensors.torch import save_file
from torch import Tensor

from loaders import adapter_plan
from loaders.adapter import AdapterTargets, AdapterWeights, ExpertShape, load_adapter
from loaders.errors import AdapterError
from tests.loaders.formats.layouts import (
    ALPHA,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    LAYER,
    MOE,
    PREFIX,
    RANK,
    TARGETS,
    Written,
    automodel,
    flat,
    per_expert,
)

PER_EXPERT = f"{PREFIX}{MOE}.2.up_proj"
TWIN_HIDDEN = 2048


@dataclass
class Load:
    """A folder to write, and how it is loaded."""

    written: Written
    settings: dict[str, Any] = field(default_factory=dict)
    targets: AdapterTargets = TARGETS
    card: str = ""
    metadata: dict[str, str] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def told(self, path: Path) -> dict[str, Any]:
        """All that a load tells but for the digest, or its refusal."""
        settings = {"r": RANK, "lora_alpha": ALPHA} | self.written.config | self.settings
        write_adapter(path, self.written.tensors, **settings)
        save_file(self.written.tensors, path / "adapter_model.safetensors", metadata=self.metadata)
        if self.card:
            (path / "README.md").write_text(self.card)
        try:
            return _as_plain(load_adapter(path, self.targets, **self.options))
        except AdapterError as refusal:
            return {"headline": refusal.headline.replace(path.name, "PATH"), "problems": list(refusal.problems)}


def _as_plain(weights: AdapterWeights) -> dict[str, Any]:
    pairs = {(name, ""): pair for name, pair in weights.linears.items()}
    for layer, experts in weights.experts.items():
        for expert, lora in experts.items():
            found = {kind: getattr(lora, kind) for kind in ("gate", "up", "down")}
            pairs |= {(f"{layer}.{expert}", kind): pair for kind, pair in found.items() if pair is not None}
    factors = {place: (pair.a.tolist(), pair.b.tolist(), pair.scale) for place, pair in pairs.items()}
    texts = {name: getattr(weights, name) for name in ("layout", "skipped", "num_bytes", "warnings", "evidence")}
    return {"factors": factors, **texts}


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    adapter_plan._accepted.cache_clear()
    yield
    adapter_plan._accepted.cache_clear()


@pytest.fixture
def num_plans(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many plans were made so far."""
    made: list[object] = []
    original = adapter_plan._checked_plan

    def count(*args: Any) -> adapter_plan.AdapterPlan:
        made.append(args)
        return original(*args)

    monkeypatch.setattr(adapter_plan, "_checked_plan", count)
    return lambda: len(made)


def _with(tensors: dict[str, Tensor]) -> Load:
    return Load(Written(per_expert().tensors | tensors))


def _unswapped() -> Written:
    return flat(is_swapped=False, is_expert_major=False, peft_version="0.19.0")


def _unmarked() -> Written:
    return flat(is_swapped=False, is_expert_major=False)


def _wide() -> Load:
    """A base as wide as two that differ in nothing but the name."""
    module = f"{MOE}.0.gate_proj"
    tensors = {
        f"{PREFIX}{module}.lora_A.weight": torch.ones(RANK, TWIN_HIDDEN),
        f"{PREFIX}{module}.lora_B.weight": torch.ones(INTERMEDIATE, RANK),
    }
    targets = AdapterTargets({}, {LAYER: ExpertShape(EXPERTS, TWIN_HIDDEN, INTERMEDIATE)}, 2, "deepseek_v3")
    return Load(Written(tensors), {"base_model_name_or_path": "moonshotai/Moonlight-16B"}, targets)


RANK_3 = {
    f"{PER_EXPERT}.lora_A.weight": torch.randn(3, HIDDEN),
    f"{PER_EXPERT}.lora_B.weight": torch.randn(INTERMEDIATE, 3),
}
HEAD_A, HEAD_B = (f"{PREFIX}lm_head.lora_{side}.weight" for side in "AB")
HEAD = {HEAD_A: torch.ones(RANK, HIDDEN), HEAD_B: torch.ones(96, RANK)}
OTHER_HEAD = replace(TARGETS, linears={"lm_head": (100, HIDDEN)})
FEWER_EXPERTS = replace(TARGETS, experts={LAYER: ExpertShape(EXPERTS - 1, HIDDEN, INTERMEDIATE)})
NO_SUCH_LAYER = replace(TARGETS, num_hidden_layers=LAYER)
WRITER = {"writer": "peft"}
PAIRS: dict[str, tuple[Load, Load]] = {
    "alpha": (Load(per_expert()), Load(per_expert(), {"lora_alpha": 2 * ALPHA})),
    "alpha of some modules": (Load(per_expert()), Load(per_expert(), {"alpha_pattern": {"up_proj": 1}})),
    "rsLoRA": (Load(per_expert()), Load(per_expert(), {"use_rslora": True})),
    "a stated rank": (Load(per_expert()), Load(per_expert(), {"rank_pattern": {"up_proj": 3}})),
    "the stated rank of all": (Load(per_expert()), Load(per_expert(), {"r": 8})),
    "a setting that is refused": (Load(per_expert()), Load(per_expert(), {"use_dora": True})),
    "a tensor's shape": (Load(per_expert()), _with(RANK_3)),
    "a tensor's type": (Load(per_expert()), _with({key: per_expert().tensors[key].half() for key in RANK_3})),
    "one more module": (Load(per_expert()), _with(HEAD)),
    "one key without use": (Load(per_expert()), _with({f"{PREFIX}x.bias": torch.ones(1)})),
    "the order of columns in the metadata": (
        Load(_unmarked(), metadata={"lora_B": "stacks (rank_major)"}),
        Load(_unmarked(), metadata={"lora_B": "stacks (other)"}),
    ),
    "the writer's version": (Load(_unswapped()), Load(_unswapped(), {"peft_version": "0.18.0"})),
    "the card": (Load(_unswapped()), Load(_unswapped(), card="tags:\n- unsloth\n")),
    "the user's word for the writer": (Load(_unmarked(), options=WRITER), Load(_unmarked())),
    "a word without effect": (Load(per_expert()), Load(per_expert(), options=WRITER)),
    "the largest rank": (Load(per_expert()), Load(per_expert(), options={"max_lora_rank": 1})),
    "a linear module of the base": (_with(HEAD), replace(_with(HEAD), targets=OTHER_HEAD)),
    "the base's experts": (Load(per_expert()), Load(per_expert(), targets=FEWER_EXPERTS)),
    "the base's layers": (Load(per_expert()), Load(per_expert(), targets=NO_SUCH_LAYER)),
    "the kind of base": (_wide(), replace(_wide(), targets=replace(_wide().targets, model_type="deepseek_v2"))),
}


@pytest.mark.parametrize("what", PAIRS)
def test_a_change_is_noticed_in_either_direction(tmp_path: Path, what: str) -> None:
    first, second = PAIRS[what]
    fresh = []
    for number, load in enumerate((first, second)):
        adapter_plan._accepted.cache_clear()
        fresh.append(load.told(tmp_path / f"fresh-{number}"))
    assert fresh[0] != fresh[1]
    adapter_plan._accepted.cache_clear()
    after = [load.told(tmp_path / f"after-{number}") for number, load in enumerate((first, second, first, second))]
    assert after == fresh * 2


def test_adapters_that_say_the_same_are_checked_once_and_keep_their_own_numbers(
    tmp_path: Path, num_plans: Callable[[], int]
) -> None:
    told = []
    for number in range(3):
        written = per_expert()
        written.tensors = {key: tensor * (number + 1) for key, tensor in written.tensors.items()}
        told.append(Load(written).told(tmp_path / str(number)))
        for place, (a, b, scale) in told[-1]["factors"].items():
            (layer, expert), kind = place[0].split("."), place[1]
            assert a == written.tensors[f"{PREFIX}{MOE}.{expert}.{kind}_proj.lora_A.weight"].tolist()
            assert b == written.tensors[f"{PREFIX}{MOE}.{expert}.{kind}_proj.lora_B.weight"].tolist()
            assert (int(layer), scale) == (LAYER, ALPHA / RANK)
    assert num_plans() == 1
    assert told[0]["evidence"] == told[1]["evidence"]


def test_refusals_are_not_remembered_and_name_their_own_folder(tmp_path: Path, num_plans: Callable[[], int]) -> None:
    for name in ("one", "two"):
        path = write_adapter(tmp_path / name, per_expert().tensors, r=RANK, lora_alpha=ALPHA, use_dora=True)
        with pytest.raises(AdapterError, match=f"{name}: adapter refused, 1 problem"):
            load_adapter(path, TARGETS)
    assert num_plans() == 2


def test_what_only_the_numbers_show_is_found_in_each_adapter(tmp_path: Path, num_plans: Callable[[], int]) -> None:
    kinds = {"good": 1.0, "zero": 0.0, "not a number": float("nan"), "good again": 1.0}
    told = {}
    for name, factor in kinds.items():
        written = per_expert()
        written.tensors[f"{PER_EXPERT}.lora_B.weight"] *= factor
        told[name] = Load(written).told(tmp_path / name)
    assert told["good"] == told["good again"] and told["good"]["skipped"] == ()
    assert told["zero"]["skipped"] == ((f"{MOE}.2.up_proj", "lora_B is all zero, no effect"),)
    assert told["not a number"]["problems"] == [f"{PER_EXPERT}.lora_B.weight: contains NaN"]
    assert num_plans() == 1


def test_a_problem_that_only_the_numbers_show_stays_with_its_adapter(
    tmp_path: Path, num_plans: Callable[[], int]
) -> None:
    """Of a gate and up that are two adapters of half the rank, the rank is known when B is read."""
    told = []
    for name, is_two in (("two", True), ("joined", False), ("two again", True)):
        written = automodel()
        b = written.tensors[f"{PREFIX}{MOE}.lora_gate_and_up_B"]
        b[:, : RANK // 2, INTERMEDIATE:] *= not is_two
        b[:, RANK // 2 :, :INTERMEDIATE] *= not is_two
        written.tensors = {key: t for key, t in written.tensors.items() if "gate_and_up" in key}
        told.append(Load(written, options={"max_lora_rank": RANK // 2}).told(tmp_path / name))
    assert told[0] == told[2] and len(told[0]["factors"]) == 2 * EXPERTS
    assert "rank 2 is above the allowed 1" in told[1]["problems"][0]
    assert num_plans() == 1


def test_large_headers_are_not_remembered(
    tmp_path: Path, num_plans: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_plan, "_MAX_REMEMBERED_BYTES", 100)
    told = [Load(per_expert()).told(tmp_path / str(number)) for number in range(2)]
    assert told[0] == told[1] and num_plans() == 2


def test_a_base_that_changes_after_a_load_is_another_base(tmp_path: Path) -> None:
    experts = dict(TARGETS.experts)
    targets = replace(TARGETS, experts=experts)
    assert "factors" in Load(per_expert(), targets=targets).told(tmp_path / "one")
    experts.clear()
    assert "has no routed experts" in Load(per_expert(), targets=targets).told(tmp_path / "two")["problems"][0]
