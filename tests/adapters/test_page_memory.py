"""Pages are written whole: what was in their memory before does not matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loaders.adapter import AdapterWeights, LoraPair, load_adapter
from loaders.errors import AdapterError
from runtime.adapters.folder_reader import FolderReader, FolderRules
from runtime.adapters.host_adapter import FactorLayout, HostAdapter, to_host_adapter
from runtime.adapters.replacement_experts import SpareRoom, read_replacement
from runtime.errors import Precondition
from runtime.models.deepseek.config import DeepseekConfig
from tests.loaders.formats.layouts import (
    ALPHA,
    LAYOUTS,
    MOE,
    PREFIX,
    RANK,
    TARGETS,
    Written,
    as_json,
    per_expert,
    sglang_shared_outer,
)
from tests.oracle.replacement_experts import moe_layers, write_replacement

ROWS_FIRST = FactorLayout(16, a_rows_first=True)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _garbage(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN everywhere."""
    memory = torch.empty(shape, dtype=dtype)
    memory.view(torch.uint8).fill_(0xFF)
    return memory


def _without(written: Written, *parts: str) -> Written:
    written.tensors = {key: tensor for key, tensor in written.tensors.items() if not any(part in key for part in parts)}
    return written


def _of_two_ranks() -> Written:
    """One expert has a projection of a higher rank than its others, one no projection but that."""
    written = _without(per_expert(), "experts.1.gate_proj", "experts.1.down_proj", "experts.3.up_proj")
    for expert in (0, 1):
        for side, axis in (("A", 0), ("B", 1)):
            key = f"{PREFIX}{MOE}.{expert}.up_proj.lora_{side}.weight"
            written.tensors[key] = torch.cat([written.tensors[key]] * 5, axis)
    return written


FILES: dict[str, Callable[[], Written]] = LAYOUTS | {
    "projections of some experts, of two ranks": _of_two_ranks,
    "shared outer factors, not of all projections": lambda: _without(sglang_shared_outer(), "up_proj"),
    "shared outer factors, not of all experts": lambda: _without(
        sglang_shared_outer(), "experts.2.gate_proj", "experts.0.down_proj"
    ),
}


def _write(path: Path, written: Written) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in written.tensors.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(as_json({"r": RANK, "lora_alpha": ALPHA} | written.config))
    return path


def _tensors(host: HostAdapter) -> dict[str, Tensor]:
    pages = {f"{number}": pages for number, pages in enumerate(host.all_pages())}
    factors = {f"{place} {name}": t for place, own in pages.items() for name, t in own.factors.items()}
    return factors | {f"regions {place}": torch.tensor(own.regions) for place, own in pages.items()}


def _assert_equal_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in theirs.items():
        assert tensor.isfinite().all(), name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [FactorLayout(), ROWS_FIRST], ids=["plain", "rows first"])
@pytest.mark.parametrize("name", FILES)
def test_pages_of_every_layout_are_the_same_over_old_bytes(
    tmp_path: Path, name: str, layout: FactorLayout, dtype: torch.dtype
) -> None:
    weights = load_adapter(_write(tmp_path, FILES[name]()), TARGETS)
    over_zeros, over_garbage = (to_host_adapter(weights, dtype, layout, memory) for memory in (_zeros, _garbage))
    _assert_equal_bits(_tensors(over_garbage), _tensors(over_zeros))


@pytest.mark.parametrize(("hidden_columns", "width_columns"), [(64, 80), (16, 8)])
def test_whole_experts_are_the_same_over_old_bytes(
    base_dir: Path, tmp_path: Path, hidden_columns: int, width_columns: int
) -> None:
    targets = DeepseekConfig.from_dir(base_dir).adapter_targets()
    path = write_replacement(base_dir, tmp_path / "esft", {layer: [9, 1] for layer in moe_layers(base_dir)}).path
    room = SpareRoom(5, 2**20, width_columns, hidden_columns)
    found = []
    for memory in (_garbage, _zeros):
        _, layers = read_replacement(path, targets, room, torch.float32, memory)
        groups = {layer: replacement.groups for layer, replacement in layers.items()}
        found.append({f"{layer} {name}": getattr(own, name) for layer, own in groups.items() for name in ("w13", "w2")})
    _assert_equal_bits(*found)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [2.0, 1 / 3, 6 / 2**0.5, 1e-3])
def test_every_number_times_the_scale_is_rounded_from_float32(
    stored: torch.dtype, target: torch.dtype, scale: float
) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(stored)
    fits = (every.float() * scale).to(target).isfinite()
    b = every[fits][: int(fits.sum()) // 8 * 8].view(-1, 8)
    weights = AdapterWeights({"m": LoraPair(torch.ones(8, 4, dtype=stored), b, scale)}, {}, str, {}, "", (), 0, ())
    (pages,) = to_host_adapter(weights, target).all_pages()
    expected = (b.float() * scale).to(target).T.contiguous()
    assert torch.equal(pages.factors["b"][0].view(torch.uint8), expected.view(torch.uint8))


def _scaled(weights: AdapterWeights, factor: float) -> AdapterWeights:
    expert = weights.experts[1][2]
    assert expert.down is not None
    changed = replace(expert, down=replace(expert.down, scale=expert.down.scale * factor))
    return replace(weights, experts={1: {**weights.experts[1], 2: changed}})


def test_one_expert_whose_scale_overflows_is_enough_for_a_refusal(tmp_path: Path) -> None:
    written = per_expert()
    weights = load_adapter(_write(tmp_path, replace(written, config={"lora_alpha": RANK})), TARGETS)
    assert weights.experts[1][2].down.scale == 1.0  # type: ignore[union-attr]
    to_host_adapter(weights, torch.float32)
    with pytest.raises(AdapterError) as refusal:
        to_host_adapter(_scaled(weights, 1e39), torch.float32)
    assert [problem.split(":")[0] for problem in refusal.value.problems] == ["routed experts of layer 1"]


def test_numbers_that_only_a_smaller_type_cannot_hold_are_refused_at_scale_one(tmp_path: Path) -> None:
    written = replace(per_expert(), config={"lora_alpha": RANK})
    written.tensors[f"{PREFIX}{MOE}.3.gate_proj.lora_A.weight"][1, 5] = 1e5
    written.tensors = {key: t.half() if "lora_B" in key else t for key, t in written.tensors.items()}
    weights = load_adapter(_write(tmp_path, written), TARGETS)
    to_host_adapter(weights, torch.bfloat16)
    with pytest.raises(AdapterError, match="overflow float16"):
        to_host_adapter(weights, torch.float16)


@pytest.mark.parametrize("alpha", [RANK, 1e8])
def test_other_files_than_expected_are_told_though_they_would_be_refused_too(tmp_path: Path, alpha: float) -> None:
    """They are hashed while pages are written, and what is wrong with pages is not what was asked."""
    written = replace(per_expert(), config={"lora_alpha": alpha})
    reader = FolderReader(FolderRules(TARGETS, 64, 2**30, torch.float16, FactorLayout()))
    with pytest.raises(Precondition) as refusal:
        reader.read("m", str(_write(tmp_path, written)), "sha256:" + "0" * 64)
    assert refusal.value.reason == "DIGEST_MISMATCH"
    if alpha > RANK:
        with pytest.raises(Precondition, match="overflow"):
            reader.read("m", str(tmp_path), "")
