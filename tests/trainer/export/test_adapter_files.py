"""Adapter folders: what is written is read back unchanged, and a write that fails changes nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loaders.adapter import load_adapter
from loaders.adapter_types import AdapterTargets, AdapterWeights, ExpertLora, ExpertShape, LoraPair
from runtime.trainer.export import adapter_files
from runtime.trainer.export.adapter_files import ExportOptions, export_notes, write_adapter
from runtime.trainer.export.folder import WriteError
from tests.trainer.export.factors import Factors, differing, draw

FORMATS = ("per-expert", "peft-v5")
LINEARS = {
    "lm_head": (50, 24),
    "model.layers.0.self_attn.o_proj": (24, 20),
    "model.layers.1.self_attn.o_proj": (24, 20),
    "model.layers.0.mlp.up_proj": (36, 24),
    "model.layers.1.mlp.shared_experts.up_proj": (12, 24),
}
TARGETS = AdapterTargets(LINEARS, {1: ExpertShape(5, 24, 10)}, 2)
FLOAT32 = ExportOptions(dtype=torch.float32)


def write(path: Path, factors: Factors, options: ExportOptions = FLOAT32, card: str | None = None) -> int:
    return write_adapter(path, factors.linears, factors.experts, TARGETS, options, card)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pairs_of(weights: AdapterWeights | Factors) -> Iterator[tuple[str, LoraPair]]:
    yield from weights.linears.items()
    for layer, adapted in weights.experts.items():
        for expert, lora in adapted.items():
            for kind in ("gate", "up", "down"):
                pair = getattr(lora, kind)
                if pair is not None:
                    yield f"{layer}.{expert}.{kind}", pair


@pytest.mark.parametrize("shared_a", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
def test_factors_are_read_back_bit_for_bit(tmp_path: Path, layout: str, shared_a: bool) -> None:
    factors = draw(TARGETS, covers=lambda layer, expert: expert != 3, shared_a=shared_a)
    num_bytes = write(tmp_path / "x", factors, replace(FLOAT32, format=layout))
    loaded = load_adapter(tmp_path / "x", TARGETS)
    before, after = dict(pairs_of(factors)), dict(pairs_of(loaded))
    assert before.keys() == after.keys()
    for name, pair in before.items():
        assert torch.equal(after[name].a, pair.a) and torch.equal(after[name].b, pair.b), name
        assert after[name].scale == pair.scale
    assert loaded.warnings == ()
    assert num_bytes == sum(path.stat().st_size for path in (tmp_path / "x").iterdir())


@pytest.mark.parametrize("layout", FORMATS)
def test_differing_ranks_and_scales_keep_their_exact_product(tmp_path: Path, layout: str) -> None:
    factors = draw(TARGETS, rank_and_scale=differing)
    write(tmp_path / "x", factors, replace(FLOAT32, format=layout))
    loaded = load_adapter(tmp_path / "x", TARGETS)
    assert len({(pair.lora_rank, pair.scale) for _, pair in pairs_of(factors)}) >= 6
    assert len({pair.scale for _, pair in pairs_of(loaded)}) == 1
    before, after = factors.deltas(), Factors(dict(loaded.linears), dict(loaded.experts)).deltas()
    assert before.keys() == after.keys()
    # Zeros are added to sums and scales differ by powers of two: not one bit may change.
    assert all(torch.equal(after[name], delta) for name, delta in before.items())


def test_a_per_expert_file_has_the_keys_and_the_config_that_servers_expect(tmp_path: Path) -> None:
    factors = draw(TARGETS, covers=lambda layer, expert: expert in (1, 4))
    options = ExportOptions(base_name="org/base", metadata={"steps": "7"})
    write(tmp_path / "x", factors, options, "# card\n")
    tensors = load_file(tmp_path / "x" / "adapter_model.safetensors")
    experts = {key.split(".experts.")[1] for key in tensors if ".mlp.experts." in key}
    expected = {f"{e}.{p}_proj.lora_{s}.weight" for e in (1, 4) for p in ("gate", "up", "down") for s in "AB"}
    assert experts == expected
    assert all(key.startswith("base_model.model.") for key in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, False)
    assert config["base_model_name_or_path"] == "org/base"
    assert config["target_modules"] == ["lm_head", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert config["target_parameters"] == ["mlp.up_proj.weight", "shared_experts.up_proj.weight"]
    with safe_open(tmp_path / "x" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "layout": "per-expert 2-D",
            "rank": "per expert and projection",
            "steps": "7",
        }
    assert (tmp_path / "x" / "README.md").read_text() == "# card\n"


@pytest.mark.parametrize("kinds", ["down", "gate", "up and down"])
@pytest.mark.parametrize("layout", FORMATS)
def test_missing_projections_stay_without_effect(tmp_path: Path, layout: str, kinds: str) -> None:
    factors = draw(TARGETS, linears=())
    for adapted in factors.experts.values():
        for expert, lora in adapted.items():
            kept = {kind: getattr(lora, kind) if kind in kinds else None for kind in ("gate", "up", "down")}
            adapted[expert] = ExpertLora(**kept)
    write(tmp_path / "x", factors, replace(FLOAT32, format=layout))
    loaded = load_adapter(tmp_path / "x", TARGETS)
    before, after = factors.deltas(), Factors(dict(loaded.linears), dict(loaded.experts)).deltas()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], delta) for name, delta in before.items())


def test_the_notes_say_who_cannot_read_an_incomplete_file() -> None:
    some, every = draw(TARGETS, covers=lambda layer, expert: expert < 2), draw(TARGETS)
    notes = export_notes(some.linears, some.experts, TARGETS, ExportOptions())
    assert notes[0].startswith("Changes 2 of the 5 routed experts and 5 other modules; rank 4, scale 2")
    assert "PEFT on transformers 5 needs every expert" in notes[-1]
    for factors, options in ((every, ExportOptions()), (some, ExportOptions("peft-v5"))):
        notes = export_notes(factors.linears, factors.experts, TARGETS, options)
        assert not any("refuses" in note for note in notes)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond this, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_grow_leaves_the_old_adapter_and_no_litter(tmp_path: Path) -> None:
    write(tmp_path / "x", draw(TARGETS, linears=("lm_head",)))
    before = contents(tmp_path / "x")
    with files_of_at_most(4096), pytest.raises(WriteError, match=r"x: cannot be written \(File too large\)"):
        write(tmp_path / "x", draw(TARGETS))
    assert contents(tmp_path / "x") == before
    with files_of_at_most(4096), pytest.raises(WriteError, match="nothing was left there"):
        write(tmp_path / "new", draw(TARGETS))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_disk_that_is_full_only_at_fsync_leaves_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x", draw(TARGETS, linears=("lm_head",)))
    before = contents(tmp_path / "x")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left on device") as caught:
        write(tmp_path / "x", draw(TARGETS))
    assert caught.value.errno == errno.ENOSPC
    assert contents(tmp_path / "x") == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_killed_process_leaves_the_old_adapter_whole(tmp_path: Path) -> None:
    write(tmp_path / "x", draw(TARGETS, linears=("lm_head",)))
    before = contents(tmp_path / "x")
    factors = draw(TARGETS)
    child = os.fork()
    if child == 0:
        adapter_files._made = lambda tensors: iter([os.kill(os.getpid(), signal.SIGKILL)])  # type: ignore[assignment]
        write(tmp_path / "x", factors)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert contents(tmp_path / "x") == before
    write(tmp_path / "x", factors)
    assert len(load_adapter(tmp_path / "x", TARGETS).linears) == 5


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_written_adapter_replaces_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr("runtime.trainer.export.folder._exchange", lambda first, second: False)
    write(tmp_path / "x", draw(TARGETS), card="old")
    write(tmp_path / "x", draw(TARGETS, linears=("lm_head",)))
    assert list(load_adapter(tmp_path / "x", TARGETS).linears) == ["lm_head"]
    assert contents(tmp_path / "x").keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"already holds thesis\.tex, which would be lost"):
        write(tmp_path, draw(TARGETS))
    with pytest.raises(ValueError, match="is a file"):
        write(tmp_path / "thesis.tex", draw(TARGETS))
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    def refused(linears: dict[str, LoraPair], experts: dict[int, dict[int, ExpertLora]], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            write_adapter(tmp_path / "x", linears, experts, TARGETS, ExportOptions(dtype=torch.float16))
        assert not any(tmp_path.iterdir())

    pair = LoraPair(torch.ones(4, 24), torch.ones(50, 4), 1.0)
    refused({}, {}, "changes nothing")
    refused({"model.layers.9.self_attn.o_proj": pair}, {}, "layers.9.self_attn.o_proj: the base has no such module")
    refused({"model.layers.0.mlp.up_proj": pair}, {}, r"b \[50, 4\] do not fit the base, which is \[36, 24\]")
    refused({}, {0: {0: ExpertLora(down=pair)}}, "layer 0 of the base has no routed experts")
    refused({}, {1: {5: ExpertLora(down=pair)}}, "layer 1 of the base has no expert 5")
    refused({}, {1: {2: ExpertLora(down=pair)}}, "experts.2.down_proj: a ")
    refused({"lm_head": replace(pair, scale=0.0)}, {}, "lm_head: scale 0.0 cannot be written")
    refused({"lm_head": replace(pair, b=pair.b * 1e6)}, {}, "lm_head.lora_B.weight: not finite in float16")
    with pytest.raises(ValueError, match="format = 'onnx' is not allowed"):
        write(tmp_path / "x", Factors({"lm_head": pair}, {}), ExportOptions("onnx"))
