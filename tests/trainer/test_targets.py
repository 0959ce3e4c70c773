"""Names of targets: which modules each of them adapts, with which rank and scale, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.config import LoraSettings, ModuleLora
from runtime.trainer.config_file import ConfigError
from runtime.trainer.targets import ALIASES, resolve_targets
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import V2_LITE, V3, Shape

# Layer 0 is dense, layers 1 and 2 have experts.
MOE, EVERY = (1, 2), (0, 1, 2)


def of_layers(layers: tuple[int, ...], *leaves: str) -> set[str]:
    return {f"model.layers.{layer}.{leaf}" for layer in layers for leaf in leaves}


DENSE = of_layers((0,), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHARED = of_layers(MOE, *(f"mlp.shared_experts.{leaf}_proj" for leaf in ("gate", "up", "down")))
ROUTED = of_layers(MOE, "mlp.experts")
Q_A, Q_B = of_layers(EVERY, "self_attn.q_a_proj"), of_layers(EVERY, "self_attn.q_b_proj")
Q = of_layers(EVERY, "self_attn.q_proj")
KV_A, KV_B = of_layers(EVERY, "self_attn.kv_a_proj_with_mqa"), of_layers(EVERY, "self_attn.kv_b_proj")
O = of_layers(EVERY, "self_attn.o_proj")  # noqa: E741 - the projection's name
HEAD = {"lm_head"}
FC1 = of_layers((0,), "mlp.gate_proj", "mlp.up_proj")
FC1 |= of_layers(MOE, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
FC2 = of_layers((0,), "mlp.down_proj") | of_layers(MOE, "mlp.shared_experts.down_proj")
CASES: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "q_a_proj": (("q_a_proj",), Q_A),
    "q_b_proj": (("q_b_proj",), Q_B),
    "kv_a_proj_with_mqa": (("kv_a_proj_with_mqa",), KV_A),
    "kv_b_proj": (("kv_b_proj",), KV_B),
    "o_proj": (("o_proj",), O),
    "experts": (("experts",), ROUTED),
    "shared_experts": (("shared_experts",), SHARED),
    "lm_head": (("lm_head",), HEAD),
    "linear_qa": (("linear_qa",), Q_A),
    "linear_qb": (("linear_qb",), Q_B),
    "linear_kva": (("linear_kva",), KV_A),
    "linear_kvb": (("linear_kvb",), KV_B),
    "linear_qkv": (("linear_qkv",), Q_A | KV_A),
    "linear_proj": (("linear_proj",), O),
    "linear_fc1": (("linear_fc1",), FC1),
    "linear_fc2": (("linear_fc2",), FC2),
    "output_layer": (("output_layer",), HEAD),
    "Megatron's usual set": (
        ("linear_qb", "linear_kvb", "linear_proj", "linear_fc1", "linear_fc2", "experts", "output_layer"),
        Q_B | KV_B | O | FC1 | FC2 | ROUTED | HEAD,
    ),
    "all three projections": (("gate_proj", "up_proj", "down_proj"), DENSE | SHARED | ROUTED),
    "a part of a name": (("self_attn",), Q_A | Q_B | KV_A | KV_B | O),
    "one layer": (("layers.2",), {name for name in Q_A | Q_B | KV_A | KV_B | O | SHARED | ROUTED if ".2." in name}),
    "a full name": (("model.layers.1.self_attn.o_proj",), {"model.layers.1.self_attn.o_proj"}),
    "experts of one layer": (("layers.1.mlp.experts",), {"model.layers.1.mlp.experts"}),
    "the whole name of experts": (("model.layers.1.mlp.experts.*",), {"model.layers.1.mlp.experts"}),
    "the dense MLP alone": (("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), DENSE),
    "one shared projection": (("shared_experts.up_proj",), of_layers(MOE, "mlp.shared_experts.up_proj")),
    "a glob": (("q_[ab]_proj",), Q_A | Q_B),
    "a glob over layers": (("layers.[12].self_attn.o_proj",), of_layers(MOE, "self_attn.o_proj")),
    "all-linear": (("all-linear",), Q_A | Q_B | KV_A | KV_B | O | DENSE | SHARED | ROUTED),  # as PEFT: no head
    "all-linear and the head": (
        ("all-linear", "lm_head"),
        Q_A | Q_B | KV_A | KV_B | O | DENSE | SHARED | ROUTED | HEAD,
    ),
    "twice the same": (("o_proj", "linear_proj"), O),
}


def modules(config: DeepseekConfig, *targets: str) -> set[str]:
    return set(resolve_targets(config, LoraSettings(targets), 0))


@pytest.fixture
def v3(oracle: Callable[[Shape], Oracle]) -> DeepseekConfig:
    return DeepseekConfig.from_dir(oracle(V3).path)


@pytest.fixture
def v2_lite(oracle: Callable[[Shape], Oracle]) -> DeepseekConfig:
    return DeepseekConfig.from_dir(oracle(V2_LITE).path)


@pytest.mark.parametrize("name", CASES)
def test_a_target_adapts_the_modules_that_its_name_says(v3: DeepseekConfig, name: str) -> None:
    targets, expected = CASES[name]
    assert modules(v3, *targets) == expected


def test_names_of_the_query_follow_the_base_that_has_no_latent_for_it(v2_lite: DeepseekConfig) -> None:
    assert modules(v2_lite, "linear_qb") == modules(v2_lite, "linear_q_proj") == modules(v2_lite, "q_proj") == Q
    assert modules(v2_lite, "linear_qkv") == Q | KV_A
    for absent in ("q_a_proj", "linear_qa"):
        with pytest.raises(ConfigError, match=f"lora.targets: '{absent}' fits no module of this base"):
            modules(v2_lite, absent)


def test_every_alias_fits_some_base(v3: DeepseekConfig, v2_lite: DeepseekConfig) -> None:
    for alias in ALIASES:
        assert modules(v2_lite if alias == "linear_q_proj" else v3, alias)


FROZEN = ("gate", "router", "embed_tokens", "word_embeddings", "mlp.gate", "model.embed_tokens")
UNKNOWN = ("q_prj", "layers.7", "layers.0.mlp.experts", "experts.3.gate_proj", "Experts", "proj", "")


@pytest.mark.parametrize("target", FROZEN)
def test_what_stays_frozen_is_refused_with_the_reason(v3: DeepseekConfig, target: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora.targets: '{target}' cannot be trained: .* frozen"):
        modules(v3, "experts", target)


@pytest.mark.parametrize("target", UNKNOWN)
def test_a_name_that_fits_nothing_is_refused_with_those_that_would(v3: DeepseekConfig, target: str) -> None:
    with pytest.raises(ConfigError, match=f"lora.targets: '{target}' fits no module") as refused:
        modules(v3, "o_proj", target)
    assert all(name in str(refused.value) for name in ("kv_b_proj", "experts", "all-linear", "linear_fc1"))


@pytest.mark.parametrize("targets", [("gate_proj",), ("gate_proj", "up_proj"), ("experts.down_proj",)])
def test_a_part_of_the_routed_experts_is_refused(v3: DeepseekConfig, targets: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"experts are adapted as a whole, but \w+_proj.* is not named"):
        modules(v3, *targets)


def test_alpha_unset_means_a_scale_of_one_and_rank_stabilised_scales_by_the_root(v3: DeepseekConfig) -> None:
    for lora, scale in (
        (LoraSettings(("o_proj",), rank=6), 1.0),
        (LoraSettings(("o_proj",), rank=6, alpha=3.0), 0.5),
        (LoraSettings(("o_proj",), rank=6, alpha=3.0, rslora=True), 3 / math.sqrt(6)),
        (LoraSettings(("o_proj",), rank=6, rslora=True), math.sqrt(6)),
    ):
        specs = list(resolve_targets(v3, lora, 0).values())
        assert [spec.rank for spec in specs] == [6] * 3
        assert [spec.scale for spec in specs] == pytest.approx([scale] * 3)


def test_all_linear_leaves_the_head_out_as_peft_does(oracle: Callable[[Shape], Oracle]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = oracle(V3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base.path), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    adapted = {name for name, _ in model.named_parameters() if ".lora_A" in name}
    assert any("o_proj" in name for name in adapted) and not any("lm_head" in name for name in adapted)
    own = modules(DeepseekConfig.from_dir(base.path), "all-linear")
    assert "lm_head" not in own and any("o_proj" in name for name in own)


def test_the_first_pattern_that_fits_decides(v3: DeepseekConfig) -> None:
    patterns = {
        "layers.1.self_attn": ModuleLora(2, 8.0),
        "linear_proj": ModuleLora(3),
        "layers.0": ModuleLora(0),
        "experts": ModuleLora(5, 10.0),
        "*_proj": ModuleLora(7),
    }
    lora = LoraSettings(("all-linear", "lm_head"), rank=16, alpha=32.0, patterns=patterns)
    specs = resolve_targets(v3, lora, 0)

    def rank_and_scale(module: str) -> tuple[int, float]:
        return specs[f"model.layers.{module}"].rank, specs[f"model.layers.{module}"].scale

    assert rank_and_scale("1.self_attn.o_proj") == rank_and_scale("1.self_attn.q_a_proj") == (2, 4.0)
    assert rank_and_scale("2.self_attn.o_proj") == rank_and_scale("0.self_attn.o_proj") == (3, 1.0)
    assert not [name for name in specs if ".layers.0." in name and "o_proj" not in name]
    assert rank_and_scale("1.mlp.experts") == (5, 2.0)
    assert rank_and_scale("2.mlp.shared_experts.up_proj") == (7, 1.0)
    assert rank_and_scale("2.self_attn.kv_a_proj_with_mqa") == (16, 2.0)
    assert (specs["lm_head"].rank, specs["lm_head"].scale) == (16, 2.0)


@pytest.mark.parametrize("pattern", ["*_proj", "all-linear", "mlp.experts.*", "mlp", "layers.1"])
def test_a_pattern_that_fits_all_projections_of_routed_experts_fits_them(v3: DeepseekConfig, pattern: str) -> None:
    lora = LoraSettings(("layers.1.mlp.experts",), rank=4, patterns={pattern: ModuleLora(9)})
    assert [spec.rank for spec in resolve_targets(v3, lora, 0).values()] == [9]


@pytest.mark.parametrize("pattern", ["down_proj", "experts.gate_proj", "layers.1.mlp.experts.up_proj"])
def test_a_pattern_that_fits_a_part_of_adapted_experts_is_refused(v3: DeepseekConfig, pattern: str) -> None:
    """It would otherwise be passed over without a word."""
    with pytest.raises(ConfigError, match=r"lora.patterns: .*experts.* one rank"):
        resolve_targets(v3, LoraSettings(("all-linear",), patterns={pattern: ModuleLora(9)}), 0)
    without = LoraSettings(("linear_fc2",), patterns={"down_proj": ModuleLora(9)})
    assert {spec.rank for spec in resolve_targets(v3, without, 0).values()} == {9}


def test_a_pattern_that_fits_nothing_is_refused(v3: DeepseekConfig) -> None:
    with pytest.raises(ConfigError, match=r"lora.patterns: 'q_proj' fits no module of this base"):
        resolve_targets(v3, LoraSettings(("experts",), patterns={"q_proj": ModuleLora(4)}), 0)


def test_a_rank_of_zero_everywhere_leaves_nothing_to_train(v3: DeepseekConfig) -> None:
    with pytest.raises(ConfigError, match="rank 0"):
        resolve_targets(v3, LoraSettings(("experts",), patterns={"experts": ModuleLora(0)}), 0)


def test_each_module_has_dropout_of_its_own(v3: DeepseekConfig) -> None:
    specs = resolve_targets(v3, LoraSettings(("all-linear",), dropout=0.25), 5)
    keys = {spec.dropout.key for spec in specs.values() if spec.dropout is not None and spec.dropout.p == 0.25}
    assert len(keys) == len(specs)
    others = resolve_targets(v3, LoraSettings(("all-linear",), dropout=0.25), 6)
    assert keys.isdisjoint(spec.dropout.key for spec in others.values() if spec.dropout is not None)
