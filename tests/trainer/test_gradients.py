"""The loss and every factor's gradient against autograd through transformers, on weights merged by hand and in PEFT."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from runtime.trainer.config import LoraSettings, ModuleLora, RoutingConfig
from runtime.trainer.micro_batch import MicroBatch
from runtime.trainer.stage import TrainingStage
from runtime.trainer.step_data import Row, num_target_tokens
from tests.conftest import RecordNumber
from tests.oracle.adapters import ATTENTION
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import V2_GROUPED, V2_LITE, V3, Shape
from tests.trainer.stages import ALL_LINEAR, gradients, make_batch, make_rows, make_stage

TOLERANCE = 1e-4
# Few different tokens, so that routing is uneven and some expert stays without any.
ROWS = make_rows(((14, 9), (21,), (1, 5, 12)), seed=3, num_words=5)
SHAPES = pytest.mark.parametrize("shape", (V3, V2_LITE, V2_GROUPED), ids=lambda shape: shape.name)


def documents_loss(call: Callable[[Tensor], Any], rows: Sequence[Row]) -> Tensor:
    """Of documents given one by one: the sum of the learnt tokens' losses over their number."""
    total = torch.zeros(())
    for document in (document for row in rows for document in row):
        tokens = torch.from_numpy(document.token_ids).long()
        is_target = torch.from_numpy(document.is_target)[1:]
        if is_target.any():
            losses = cross_entropy(call(tokens[None]).logits[0, :-1].float(), tokens[1:], reduction="none")
            total = total + losses[is_target].sum()
    return total / sum(num_target_tokens(row) for row in rows)


def merged_gradients(
    model: nn.Module, stage: TrainingStage, rows: Sequence[Row]
) -> tuple[float, dict[str, Tensor]]:
    """Autograd through transformers with weights W + scale B A, for copies of the stage's factors."""
    leaves = {p.name: p.tensor.detach().clone().requires_grad_() for p in stage.lora_parameters()}
    weights: dict[str, Tensor] = {}
    for parameter in stage.lora_parameters():
        if not parameter.name.endswith("lora_A"):
            continue
        module = parameter.name.removesuffix(".lora_A")
        delta = parameter.scale * leaves[f"{module}.lora_B"] @ leaves[f"{module}.lora_A"]
        if parameter.experts is None:
            weight = model.get_parameter(f"{module}.weight").detach()
            weights[f"{module}.weight"] = (weight + delta).to(weight.dtype)
        else:
            fused = model.get_parameter(module).detach()
            weights[module] = fused.index_add(0, torch.tensor(parameter.experts), delta.to(fused.dtype))
    loss = documents_loss(lambda ids: functional_call(model, weights, (), {"input_ids": ids}), rows)
    loss.backward()
    return loss.item(), {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}


def peft_gradients(base: Oracle, stage: TrainingStage, rows: Sequence[Row]) -> tuple[float, dict[str, Tensor]]:
    """Of a real PEFT model of rank 4 and alpha 8 that holds the stage's factors."""
    from peft import LoraConfig, get_peft_model

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, "lm_head"], target_parameters=experts)
    model = get_peft_model(copy.deepcopy(base.model), config)
    factors = {name: x for name, x in model.named_parameters() if ".lora_" in name}
    seen = {_name_of_peft(name): x for name, x in factors.items()}
    ours = {parameter.name: parameter.tensor.detach() for parameter in stage.lora_parameters()}
    assert seen.keys() == ours.keys()
    with torch.no_grad():
        for name, x in seen.items():
            x.copy_(_as_in_peft(ours[name]))
    loss = documents_loss(lambda ids: model(input_ids=ids), rows)
    loss.backward()
    return loss.item(), {name: _as_here(x.grad, ours[name]) for name, x in seen.items() if x.grad is not None}


def _name_of_peft(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".default.weight", "")
    name = name.replace(".experts.base_layer.lora", ".experts.gate_up_proj.lora")
    return name.replace(".experts.lora", ".experts.down_proj.lora")


def _as_in_peft(factor: Tensor) -> Tensor:
    """A of experts [E, R, in] -> [E R, in]; B [E, out, R] -> [out, R E], the expert fastest."""
    if factor.ndim == 2:
        return factor
    is_a = factor.shape[1] == 4
    return factor.flatten(0, 1) if is_a else factor.permute(1, 2, 0).flatten(1)


def _as_here(factor: Tensor, like: Tensor) -> Tensor:
    if like.ndim == 2:
        return factor
    num_experts, rows, columns = like.shape
    if rows == 4:
        return factor.view(like.shape)
    return factor.view(rows, columns, num_experts).permute(2, 0, 1)


def worst_by_kind(seen: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference of each kind of module, relative to the largest number of the expected gradient."""
    assert seen.keys() == expected.keys()
    worst: dict[str, float] = defaultdict(float)
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert largest > 1e-6, f"{name} has no gradient, so that it would prove nothing"
        difference = (seen[name] - gradient).abs().max().item() / largest
        kind = re.sub(r"^model\.layers\.\d+\.|\.lora_.$", "", name)
        worst[kind] = max(worst[kind], difference)
    return worst


def record_all(record_number: RecordNumber, what: str, seen: Any, expected: Any) -> None:
    """Check the loss and every kind's gradients."""
    record_number(f"{what}: loss", abs(seen[0] - expected[0]) / expected[0], at_most=1e-5)
    for kind, worst in sorted(worst_by_kind(seen[1], expected[1]).items()):
        record_number(f"{what}: gradient of {kind}", worst, at_most=TOLERANCE)


def tokens_of_experts(stage: TrainingStage, batch: MicroBatch) -> dict[int, Tensor]:
    """Layer -> tokens that each of its experts gets."""
    counts: dict[int, Tensor] = {}
    num_experts = stage.config.n_routed_experts
    for layer, moe in stage.moe_layers().items():

        def observe(_: Tensor, experts_TK: Tensor, batch: MicroBatch, layer: int = layer) -> None:
            counts[layer] = torch.bincount(experts_TK[batch.is_real_T].flatten(), minlength=num_experts)

        moe.observe_routing = observe
    with torch.no_grad():
        stage.hidden(None, batch)
    return counts


@SHAPES
def test_gradients_of_every_kind_of_module_equal_autograd_on_merged_weights(
    oracle: Callable[[Shape], Oracle], record_number: RecordNumber, shape: Shape
) -> None:
    base = oracle(shape)
    stage = make_stage(base)
    kinds = {parameter.name.split(".")[-2] for parameter in stage.lora_parameters()}
    assert {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "gate_up_proj", "lm_head"} <= kinds
    seen = gradients(stage, [make_batch(ROWS)])
    record_all(record_number, f"{shape.name} vs merged weights", seen, merged_gradients(base.model, stage, ROWS))


@SHAPES
def test_the_gradient_tests_route_unevenly_and_leave_an_expert_without_tokens(
    oracle: Callable[[Shape], Oracle], shape: Shape
) -> None:
    stage = make_stage(oracle(shape))
    counts = torch.stack(list(tokens_of_experts(stage, make_batch(ROWS)).values()))
    assert counts.min() == 0
    assert counts.max() > 2 * counts.float().mean()


@SHAPES
def test_gradients_of_attention_head_and_routed_experts_equal_those_of_peft(
    oracle: Callable[[Shape], Oracle], record_number: RecordNumber, shape: Shape
) -> None:
    base = oracle(shape)
    targets = ("q*_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "experts", "lm_head")
    stage = make_stage(base, LoraSettings(targets, rank=4, alpha=8.0))
    seen = gradients(stage, [make_batch(ROWS)])
    record_all(record_number, f"{shape.name} vs PEFT", seen, peft_gradients(base, stage, ROWS))


PATTERNS = {
    "experts": ModuleLora(5, 2.0),
    "q_b_proj": ModuleLora(7),
    "shared_experts": ModuleLora(1, 3.0),
    "layers.0": ModuleLora(6),
    "o_proj": ModuleLora(0),
}
VARIANTS: dict[str, tuple[LoraSettings, dict[str, Any]]] = {
    "rank-stabilised scale": (LoraSettings(("all-linear", "lm_head"), rank=4, alpha=8.0, rslora=True), {}),
    "rank 3": (LoraSettings(("all-linear", "lm_head"), rank=3), {}),
    "a rank for each module": (LoraSettings(("all-linear", "lm_head"), rank=4, patterns=PATTERNS), {}),
    "some experts": (ALL_LINEAR, {"adapted": (1, 4, 5, 15)}),
    "one expert": (LoraSettings(("experts",), rank=2), {"adapted": (6,)}),
    "recomputed activations": (ALL_LINEAR, {"activation_checkpointing": True}),
    "last layer alone": (LoraSettings(("layers.2.mlp.experts", "lm_head"), rank=4), {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_of_every_variant_equal_autograd_on_merged_weights(
    oracle: Callable[[Shape], Oracle], record_number: RecordNumber, name: str
) -> None:
    base = oracle(V3)
    lora, options = VARIANTS[name]
    stage = make_stage(base, lora, **options)
    seen, expected = gradients(stage, [make_batch(ROWS)]), merged_gradients(base.model, stage, ROWS)
    record_number(f"{name}: loss", abs(seen[0] - expected[0]) / expected[0], at_most=1e-5)
    worst = max(worst_by_kind(seen[1], expected[1]).values())
    record_number(f"{name}: worst gradient vs merged weights", worst, at_most=TOLERANCE)


def test_patterns_give_every_module_its_own_rank_and_rank_zero_leaves_it_alone(
    oracle: Callable[[Shape], Oracle],
) -> None:
    stage = make_stage(oracle(V3), LoraSettings(("all-linear", "lm_head"), rank=4, patterns=PATTERNS))
    ranks = {p.name: p.shape[0] for p in stage.lora_parameters() if p.name.endswith("lora_A")}
    assert ranks["model.layers.1.mlp.experts.down_proj.lora_A"] == 5
    assert ranks["model.layers.1.self_attn.q_b_proj.lora_A"] == 7
    assert ranks["model.layers.0.mlp.up_proj.lora_A"] == 6
    assert not [name for name in ranks if "layers.1.self_attn.o_proj" in name]
    assert ranks["model.layers.0.self_attn.o_proj.lora_A"] == 6


@SHAPES
@pytest.mark.parametrize("routing", [RoutingConfig(), RoutingConfig(0.1, 1.0, "reroute")], ids=["plain", "balanced"])
def test_recomputed_activations_change_no_gradient(
    oracle: Callable[[Shape], Oracle], shape: Shape, routing: RoutingConfig
) -> None:
    """With dropout and balance, whose second computation must make the same choices as the first."""
    lora = LoraSettings(("all-linear", "lm_head"), rank=4, dropout=0.3)
    batches = [make_batch(ROWS)]
    plain, again = (
        gradients(make_stage(oracle(shape), lora, routing=routing, activation_checkpointing=on), batches)
        for on in (False, True)
    )
    assert plain[0] == again[0]
    assert [name for name, gradient in plain[1].items() if not torch.equal(gradient, again[1][name])] == []


@SHAPES
def test_gradients_do_not_depend_on_the_split_into_micro_batches(
    oracle: Callable[[Shape], Oracle], shape: Shape
) -> None:
    stage = make_stage(oracle(shape), LoraSettings(("all-linear", "lm_head"), rank=4, dropout=0.3))
    whole = gradients(stage, [make_batch(ROWS)])
    split = gradients(stage, [make_batch([row], of=ROWS, first_row=index) for index, row in enumerate(ROWS)])
    assert split[0] == pytest.approx(whole[0], rel=1e-6)
    assert max(worst_by_kind(split[1], whole[1]).values()) < 1e-5


@SHAPES
def test_bfloat16_gradients_are_as_near_to_those_of_float32_as_transformers_are(
    oracle: Callable[[Shape], Oracle], record_number: RecordNumber, shape: Shape
) -> None:
    """Over several batches: rounding sends some tokens to other experts, which makes most of the difference."""
    base = oracle(shape)
    stage, rounded = make_stage(base), make_stage(base, dtype=torch.bfloat16)
    rounded_model = copy.deepcopy(base.model).bfloat16()
    ours = theirs = 0.0
    for seed in range(4):
        rows = make_rows(((14, 9), (21,), (1, 5, 12)), seed=seed)
        loss, exact = gradients(stage, [make_batch(rows)])
        seen_loss, seen = gradients(rounded, [make_batch(rows)])
        assert seen_loss == pytest.approx(loss, rel=0.03)
        assert all(gradient.dtype is torch.float32 for gradient in seen.values())
        ours += distance(seen, exact)
        theirs += distance(merged_gradients(rounded_model, rounded, rows)[1], exact)
    record_number(f"{shape.name}: bfloat16 gradient error, in those of transformers", ours / theirs, at_most=1.5)


def distance(seen: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The norm of the difference, relative to that of the exact gradients."""
    difference = torch.cat([(seen[name] - gradient).flatten() for name, gradient in exact.items()])
    return float(difference.norm() / torch.cat([gradient.flatten() for gradient in exact.values()]).norm())
