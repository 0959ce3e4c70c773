"""MLA's projections of a decoding step as one operator: when it runs, what it gives, what is told when it does not."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from runtime.ops import told
from runtime.ops.base import Ops, make_ops
from runtime.ops.cpu import CpuOps
from runtime.ops.latent_cache import LatentCache
from runtime.ops.mla_weights import MlaWeights, QueryLatent
from runtime.ops.npu import prolog
from runtime.ops.npu.ops import NpuOps
from runtime.ops.rotation import Rotation
from tests.conftest import RecordNumber
from tests.npu import bench
from tests.npu.bench.formats import is_in_fractals
from tests.npu.held_choice import HeldNpu, Recorded
from tests.npu.models import OPERATOR_SIZES, engine_with, feed, relative_errors, write_base
from tests.npu.no_waiting import no_waiting
from tests.oracle.adapters import AdapterRecipe, write_adapter

CPU, HALF = torch.device("cpu"), torch.bfloat16
NUM_HEADS, NUM_TOKENS = 2, 5
PROLOG = "npu_mla_prolog_v3"
V3_WIDTHS = {"hidden_size": 7168, "q_lora_rank": 1536, "num_attention_heads": NUM_HEADS,
             "num_key_value_heads": NUM_HEADS, "num_hidden_layers": 2}  # fmt: skip


@pytest.fixture(autouse=True)
def counted() -> None:
    bench.calls.clear()
    told._told.clear()
    prolog._tell_use.cache_clear()


def _weights(
    hidden: int = 7168, latent: int | None = 1536, heads: int = NUM_HEADS, dtype: torch.dtype = HALF
) -> MlaWeights:
    def drawn(*shape: int) -> Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)

    return MlaWeights(
        None if latent is None else QueryLatent(drawn(latent, hidden), torch.ones(latent, dtype=dtype)),
        drawn(heads * 192, latent or hidden),
        drawn(heads, 128, 512),
        drawn(576, hidden),
        torch.ones(512, dtype=dtype),
        1e-6,
    )


def _inputs(ops: Ops, block_tokens: int = 16, dtype: torch.dtype = HALF) -> tuple[Rotation, LatentCache, Tensor]:
    angles_TF = torch.rand(NUM_TOKENS, 32, generator=torch.Generator().manual_seed(3)) * 6
    cache = ops.make_cache(4 * block_tokens, block_tokens, (512, 64), dtype, CPU)
    return Rotation(angles_TF.cos(), angles_TF.sin()), cache, torch.tensor([3, 60, 17, 33, 0])


def _largest_error(seen: Tensor, exact: Tensor) -> float:
    return ((seen.float() - exact).abs().max() / exact.abs().max()).item()


def test_one_operator_gives_the_references_queries_and_latents(record_number: RecordNumber) -> None:
    torch.manual_seed(0)
    weights, x = _weights(), torch.randn(NUM_TOKENS, 7168).to(HALF)
    ops, exact_ops = NpuOps(), CpuOps()
    packed = ops.pack_mla(weights)
    rotation, cache, slots = _inputs(ops)
    with no_waiting():
        queries = ops.decode_queries(x, packed, rotation, cache, slots)
    assert bench.calls == {PROLOG: 1, "npu_format_cast": 3, "get_npu_format": 3}
    latent = weights.query_latent
    assert latent is not None
    exact = replace(
        weights, query_latent=QueryLatent(latent.down_RK.float(), latent.norm_R.float()),
        query_up_OR=weights.query_up_OR.float(), key_up_HNC=weights.key_up_HNC.float(),
        kv_down_XK=weights.kv_down_XK.float(), kv_norm_C=weights.kv_norm_C.float(),
    )  # fmt: skip
    _, exact_cache, _ = _inputs(exact_ops, dtype=torch.float32)
    expected = exact_ops.decode_queries(x.float(), exact, rotation, exact_cache, slots)
    errors = [_largest_error(*pair) for pair in zip(queries, expected, strict=True)]
    errors += [
        _largest_error(cache.latent_SC, exact_cache.latent_SC),
        _largest_error(cache.rope_SD, exact_cache.rope_SD),
    ]
    record_number("MLA's projections by one operator, largest error", max(errors), at_most=2e-2)


def test_packed_weights_take_the_place_and_the_bytes_of_those_that_were_loaded() -> None:
    torch.manual_seed(0)
    weights, ops, x = _weights(), NpuOps(), torch.randn(2, 7168).to(HALF)
    packed = ops.pack_mla(weights)
    pairs = [(weights.kv_down_XK, packed.kv_down_XK), (weights.query_up_OR, packed.query_up_OR)]
    for loaded, cast in pairs:
        assert is_in_fractals(cast) and cast.shape == loaded.shape and torch.equal(cast, loaded)
        assert cast.untyped_storage().nbytes() == loaded.untyped_storage().nbytes()
    assert packed.key_up_HNC is weights.key_up_HNC
    assert torch.equal(ops.linear(x, packed.kv_down_XK), ops.linear(x, weights.kv_down_XK))


REASONS: dict[str, tuple[Callable[[], MlaWeights], str]] = {
    "V2-Lite": (lambda: _weights(2048, None), "queries without a latent"),
    "another hidden size": (lambda: _weights(2048), r"hidden, query latent, .* of \(2048, 1536, 512, 128, 64\)"),
    "another latent": (lambda: _weights(latent=1024), r"\(7168, 1024,"),
    "three heads": (lambda: _weights(heads=3), "3 heads"),
    "float32": (lambda: _weights(dtype=torch.float32), "torch.float32"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_other_models_keep_the_separate_operators_and_are_told_once(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, sentence = REASONS[reason]
    _expect_separate(NpuOps(), make(), 16, sentence, caplog)


def _expect_separate(
    ops: NpuOps, weights: MlaWeights, block_tokens: int, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(NUM_TOKENS, weights.kv_down_XK.shape[1]).to(weights.kv_down_XK.dtype)
    with caplog.at_level(logging.WARNING):
        packed = ops.pack_mla(ops.pack_mla(weights))
        rotation, cache, slots = _inputs(ops, block_tokens, x.dtype)
        ops.decode_queries(x, packed, rotation, cache, slots)
        ops.decode_queries(x, packed, rotation, cache, slots)
    assert not bench.calls[PROLOG]
    told_of_it = [record for record in caplog.records if PROLOG in record.getMessage()]
    assert len(told_of_it) == 1
    assert "replaced by the separate operators" in told_of_it[0].getMessage()
    [reason] = [reason for operator, reason in told.replaced() if operator == PROLOG]
    assert re.search(sentence, reason)


def test_blocks_that_it_does_not_take_are_told(caplog: pytest.LogCaptureFixture) -> None:
    ops = NpuOps()
    weights = ops.pack_mla(_weights())
    rotation, cache, slots = _inputs(ops, 32)
    ops.decode_queries(torch.randn(NUM_TOKENS, 7168).to(HALF), weights, rotation, cache, slots)
    assert not bench.calls[PROLOG] and "--kv-block-tokens 32" in caplog.text


def test_it_is_turned_off_on_request(caplog: pytest.LogCaptureFixture) -> None:
    _expect_separate(NpuOps(mla_prolog=False), _weights(), 16, "GRAFT_NPU_MLA_PROLOG is 0", caplog)


def test_a_torch_npu_without_it_keeps_the_separate_operators(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(prolog.torch_npu, PROLOG)
    _expect_separate(NpuOps(), _weights(), 16, "has no such operator", caplog)


def test_a_device_that_does_not_cast_keeps_the_separate_operators(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prolog.torch_npu, "npu_format_cast", lambda weight, layout: weight.clone())
    _expect_separate(NpuOps(), _weights(), 16, "FRACTAL_NZ", caplog)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "v3-widths", OPERATOR_SIZES | V3_WIDTHS).path


RECIPES: dict[str, Any] = {
    "experts": AdapterRecipe(("routed_experts",), lora_rank=16, seed=1, dtype=HALF),
    "o": AdapterRecipe(("o_proj",), lora_rank=8, seed=2, dtype=HALF),
    "q_a": AdapterRecipe(("q_a_proj",), lora_rank=8, seed=3, dtype=HALF),
    "kv_b": AdapterRecipe(("kv_b_proj",), lora_rank=8, seed=4, dtype=HALF),
}


@pytest.mark.parametrize("adapted", [[], ["experts", "o"], ["experts", "q_a"], ["kv_b"]], ids="+".join)
def test_decoding_steps_run_it_unless_one_of_their_adapters_is_on_its_projections(
    adapted: list[str], base: Path, tmp_path: Path, record_number: RecordNumber
) -> None:
    """All adapters are resident; those named run."""
    adapters = [write_adapter(base, tmp_path / name, recipe).path for name, recipe in RECIPES.items()]
    slots = [-1, *(list(RECIPES).index(name) for name in adapted)]

    def fed(ops: Ops) -> Tensor:
        with engine_with(ops, base, adapters, "bfloat16") as driver:
            bench.calls.clear()
            return feed(driver.engine.runner, [30, 12, 7][: len(slots)], slots, num_steps=6)

    reference = Recorded()
    with engine_with(reference, base, adapters, "float32") as driver:
        feed(driver.engine.runner, [30, 12, 7][: len(slots)], slots, num_steps=6)
    one = fed(HeldNpu(reference.choices))
    uses = not {"q_a", "kv_b"} & set(adapted)
    assert bench.calls[PROLOG] == (2 * 4 if uses else 0)  # two layers; two of the six steps hold a chunk of a prompt
    separate = fed(HeldNpu(reference.choices, mla_prolog=False))
    error = relative_errors(one, separate).max().item()
    record_number(f"logits with one operator vs separate, {'+'.join(adapted) or 'base'}", error, at_most=2e-2)
    assert uses or error == 0


def test_its_use_is_told_once(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=prolog.logger.name), engine_with(NpuOps(), base, [], "bfloat16"):
        pass
    assert sum(PROLOG in record.getMessage() for record in caplog.records) == 1
    assert "without a second copy" in caplog.text


def test_loaded_weights_are_freed_as_each_layer_is_packed(base: Path) -> None:
    class Watching(NpuOps):
        loaded: ClassVar[list[StorageWeakRef]] = []

        def pack_mla(self, weights: MlaWeights) -> MlaWeights:
            gc.collect()
            assert all(storage.expired() for storage in self.loaded)
            for weight in (weights.query_up_OR, weights.kv_down_XK):
                self.loaded.append(StorageWeakRef(weight.untyped_storage()))
            return super().pack_mla(weights)

    with engine_with(Watching(), base, [], "bfloat16"):
        gc.collect()
        assert len(Watching.loaded) == 4 and all(storage.expired() for storage in Watching.loaded)


@pytest.mark.parametrize(("value", "is_allowed"), [(None, True), ("1", True), ("0", False)])
def test_the_environment_turns_it_off(value: str | None, is_allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFT_NPU_MLA_PROLOG", raising=False)
    if value is not None:
        monkeypatch.setenv("GRAFT_NPU_MLA_PROLOG", value)
    packed = make_ops(torch.device("npu")).pack_mla(_weights())
    assert is_in_fractals(packed.kv_down_XK) == is_allowed


def test_another_value_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_NPU_MLA_PROLOG", "off")
    with pytest.raises(ValueError, match="GRAFT_NPU_MLA_PROLOG = 'off': use 0 or 1"):
        make_ops(torch.device("npu"))
