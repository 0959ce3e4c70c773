"""Flat stacks of experts: four writers share the keys, two pairs of them also the shapes. Told apart, or refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_builders import TinyModel, assert_same_deltas, our_deltas, write_adapter
from safetensors.torch import load

from loaders.adapter import WRITERS, AdapterTargets, ExpertShape, load_adapter
from loaders.errors import AdapterError
from runtime.cli import main
from runtime.config import ADAPTER_WRITERS
from tests.loaders.formats import layouts
from tests.loaders.formats.layouts import ALPHA, EXPERTS, HIDDEN, LAYER, MOE, RANK, TARGETS, Written, flat, per_expert

WRITTEN = Path(__file__).parent / "written"


def write(path: Path, written: Written, **config: Any) -> Path:
    return write_adapter(path, written.tensors, **{"r": RANK, "lora_alpha": ALPHA} | written.config | config)


def problem_of(path: Path, writer: str | None = None, targets: AdapterTargets = TARGETS) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(path, targets, writer=writer)
    assert len(caught.value.problems) == 1, caught.value.problems
    return caught.value.problems[0]


@pytest.mark.parametrize("version", ["0.18.1", "0.19.1"])
def test_files_of_old_versions_of_peft_mean_what_those_versions_merged(version: str) -> None:
    folder = WRITTEN / f"peft-{version}"
    targets = AdapterTargets({}, {1: ExpertShape(3, 12, 5)}, 2)
    weights = load_adapter(folder, targets)
    assert_same_deltas(our_deltas(weights), load(folder.with_name(f"{folder.name}.deltas").read_bytes()), 1e-4)
    assert f"peft_version {version} in adapter_config.json" in weights.evidence


@pytest.mark.parametrize("writer", WRITERS)
def test_a_hint_settles_what_the_files_leave_open(tmp_path: Path, writer: str) -> None:
    order = WRITERS[writer]
    written = flat(is_swapped=order.is_swapped, is_expert_major=order.is_expert_major)
    path = write(tmp_path, written)
    twins = [name for name, other in WRITERS.items() if other.is_swapped == order.is_swapped]
    assert f"--format-hint {{{','.join(twins)}}}" in problem_of(path)
    assert_same_deltas(our_deltas(load_adapter(path, TARGETS, writer=writer)), written.deltas, 1e-4)
    for other in set(WRITERS) - set(twins):
        assert f"--format-hint {other} does not fit the shapes" in problem_of(path, other)


def test_the_wrong_hint_for_a_twin_gives_other_weights(tmp_path: Path) -> None:
    """Why nothing is guessed: no shape and no exception would tell."""
    written = flat(is_swapped=False, is_expert_major=True)
    ours = our_deltas(load_adapter(write(tmp_path, written), TARGETS, writer="peft"))
    assert not torch.allclose(ours[f"{MOE}.0.up_proj.weight"], written.deltas[f"{MOE}.0.up_proj.weight"], atol=0.1)


UNSLOTH_SIGNS: list[dict[str, Any]] = [
    {"auto_mapping": {"unsloth_fixed": True}},
    {"base_model_name_or_path": "unsloth/DeepSeek-V3"},
]


@pytest.mark.parametrize("sign", UNSLOTH_SIGNS)
def test_a_file_of_unsloth_without_its_mark_is_refused(tmp_path: Path, sign: dict[str, Any]) -> None:
    written = flat(is_swapped=False, is_expert_major=False, peft_version="0.19.1", **sign)
    path = write(tmp_path, written)
    assert "names Unsloth but not lora_B_layout" in problem_of(path)
    load_adapter(write(tmp_path, written, lora_B_layout="rank_major"), TARGETS)


@pytest.mark.parametrize(
    ("version", "is_swapped"), [("0.17.0", True), ("0.18.2.dev0", True), ("0.19.0rc1", False), ("1.0.0", False)]
)
def test_versions_are_compared_as_numbers(tmp_path: Path, version: str, is_swapped: bool) -> None:
    written = flat(is_swapped=is_swapped, is_expert_major=False, peft_version=version)
    assert_same_deltas(our_deltas(load_adapter(write(tmp_path, written), TARGETS)), written.deltas, 1e-4)


def test_a_model_card_of_unsloth_is_a_sign_too(tmp_path: Path) -> None:
    path = write(tmp_path, flat(is_swapped=False, is_expert_major=False, peft_version="0.19.1"))
    load_adapter(path, TARGETS)
    (path / "README.md").write_text("---\ntags:\n- base_model:adapter:x\n- unsloth\n---\n")
    assert "names Unsloth but not lora_B_layout" in problem_of(path)


def test_stacks_that_graft_exported_say_their_order_themselves(
    tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for a base whose name would leave it open."""
    written = per_expert()
    path = write(tmp_path / "in", written, base_model_name_or_path="unsloth/DeepSeek-V3")
    out = tmp_path / "out"
    arguments = ["export", path, "--base", tiny.path, "--out", out, "--format", "peft-v5", "--dtype", "float32"]
    assert main([str(argument) for argument in arguments]) == 0
    weights = load_adapter(out, TARGETS)
    assert_same_deltas(our_deltas(weights), written.deltas, 1e-4)
    assert "rank_major in the metadata of the safetensors file" in weights.evidence
    capsys.readouterr()


@pytest.mark.parametrize(
    ("is_swapped", "config", "writer", "words"),
    [
        (True, {"peft_version": "0.21.2"}, None, "these are the other way round"),
        (False, {"peft_version": "0.18.1"}, None, "these are the other way round"),
        (False, {"lora_B_layout": "by_mood"}, None, "lora_B_layout 'by_mood' is not one of"),
        (False, {"lora_B_layout": "rank_major"}, "unsloth", "--format-hint unsloth contradicts lora_B_layout"),
        (False, {"peft_version": 19}, None, "neither lora_B_layout nor peft_version"),
    ],
)
def test_contradicting_evidence_is_refused(
    tmp_path: Path, is_swapped: bool, config: dict[str, Any], writer: str | None, words: str
) -> None:
    path = write(tmp_path, flat(is_swapped=is_swapped, is_expert_major=False), **config)
    assert words in problem_of(path, writer)


def test_one_swapped_stack_among_others_is_refused(tmp_path: Path) -> None:
    straight, swapped = (flat(is_swapped=value, is_expert_major=False) for value in (False, True))
    straight.tensors |= {key: value for key, value in swapped.tensors.items() if "base_layer" in key}
    path = write(tmp_path, straight, peft_version="0.21.2")
    assert "some stacks of experts have in and out swapped and others have not" in problem_of(path)


@pytest.mark.parametrize(("stack", "is_swapped"), list(product(("gate_up", "down"), (False, True))))
def test_square_stacks_are_told_apart_by_the_version_of_peft_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: str, is_swapped: bool
) -> None:
    """H = 2I for gate_up and H = I for down: the shapes are equal either way."""
    intermediate = HIDDEN // 2 if stack == "gate_up" else HIDDEN
    monkeypatch.setattr(layouts, "INTERMEDIATE", intermediate)
    monkeypatch.setattr(
        layouts,
        "WIDTHS",
        {"gate": (intermediate, HIDDEN), "up": (intermediate, HIDDEN), "down": (HIDDEN, intermediate)},
    )
    targets = AdapterTargets({}, {LAYER: ExpertShape(EXPERTS, HIDDEN, intermediate)}, 2)
    written = flat(is_swapped=is_swapped, is_expert_major=False, stacks=(stack,))
    assert "{peft,peft-0.18,unsloth,megatron-bridge}" in problem_of(write(tmp_path, written), targets=targets)
    marked = write(tmp_path, written, lora_B_layout="rank_major")
    assert "{peft,peft-0.18}" in problem_of(marked, targets=targets)
    weights = load_adapter(write(tmp_path, written, peft_version="0.18.1" if is_swapped else "0.19.0"), targets)
    assert_same_deltas(our_deltas(weights), written.deltas, 1e-4)


def test_the_order_of_columns_does_not_matter_at_rank_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "RANK", 1)
    monkeypatch.setattr(layouts, "SCALE", float(ALPHA))
    written = flat(is_swapped=False, is_expert_major=True)
    path = write_adapter(tmp_path, written.tensors, r=1, lora_alpha=ALPHA)
    assert_same_deltas(our_deltas(load_adapter(path, TARGETS)), written.deltas, 1e-4)


def test_the_command_line_offers_the_writers_that_the_loader_knows() -> None:
    assert tuple(WRITERS) == ADAPTER_WRITERS


def test_the_written_fixtures_are_small() -> None:
    assert sum(path.stat().st_size for path in WRITTEN.rglob("*") if path.is_file()) < 20_000
