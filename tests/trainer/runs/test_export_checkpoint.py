"""`graft export CHECKPOINT`: the adapter that the run had at that step, whatever became of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loaders.adapter import load_adapter
from runtime.distributed.mesh import make_mesh
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.config_file import read_config
from runtime.trainer.gather import gather_adapter
from runtime.trainer.loop import Training
from runtime.trainer.stage import mesh_shape
from tests.trainer.runs.demo import MODEL, OPTIONS, Graft, adapter_tensors, write_config

PROJECTIONS = ("gate", "up", "down")
CASES: dict[str, dict[str, Any]] = {
    "experts": {"lora": {"targets": ["experts"], "rank": 4}},
    "options": OPTIONS,
    "patterns": {
        "lora": {
            "targets": ["all-linear", "lm_head"],
            "rank": 4,
            "rslora": True,
            "patterns": {"o_proj": {"rank": 2, "alpha": 9.0}, "shared_experts": {"rank": 8}},
        }
    },
}


def train(tmp_path: Path, rows: Path, **changes: Any) -> Training:
    config = read_config(write_config(tmp_path / "run.yaml", rows, tmp_path / "out", steps=4, **changes))
    training = Training(config, make_mesh(mesh_shape(config.parallel)), torch.device("cpu"))
    training.run()
    return training


@pytest.mark.parametrize("name", CASES)
def test_an_exported_checkpoint_is_the_adapter_of_its_step(
    graft: Graft, tmp_path: Path, rows: Path, name: str
) -> None:
    training = train(tmp_path, rows, **CASES[name])
    output = tmp_path / "out"
    said = graft("export", output / "checkpoints" / "step-00000004", "--base", MODEL, "--out", tmp_path / "exported")
    assert said.status == 0, said.err
    own, exported = adapter_tensors(output / "adapter"), adapter_tensors(tmp_path / "exported")
    assert own.keys() == exported.keys()
    for key, tensor in own.items():
        assert tensor.dtype == exported[key].dtype == torch.float32, "what the run computed in"
        assert torch.equal(tensor, exported[key]), key
    cards = [(folder / "README.md").read_text() for folder in (output / "adapter", tmp_path / "exported")]
    tables = [[line for line in card.splitlines() if line.startswith("| ")] for card in cards]
    assert tables[0] == tables[1] and "| lora.rank | 4 |" in tables[1], "settings and metrics of the run"
    _compare_in_float32(graft, tmp_path, training)


def _compare_in_float32(graft: Graft, tmp_path: Path, training: Training) -> None:
    """scale x B A of the trained factors, which any layout of the file must mean."""
    checkpoint, out = tmp_path / "out" / "checkpoints" / "step-00000004", tmp_path / "exact"
    assert graft("export", checkpoint, "--base", MODEL, "--out", out, "--dtype", "float32").status == 0
    exact = load_adapter(out, DeepseekConfig.from_dir(MODEL).adapter_targets(), max_lora_rank=512)
    adapter = gather_adapter(training.model.parameters, training.mesh)
    assert adapter is not None
    for module, pair in adapter.linears.items():
        other = exact.linears[module]
        torch.testing.assert_close(other.scale * other.b @ other.a, pair.scale * pair.b @ pair.a, rtol=1e-6, atol=1e-9)
    for layer, experts in adapter.experts.items():
        for expert, lora in experts.items():
            pairs = [getattr(lora, projection) for projection in PROJECTIONS]
            if expert not in exact.experts[layer]:  # the file has it, its reader leaves out what changes nothing
                assert all(not bool(pair.b.any()) for pair in pairs)
                continue
            for projection, pair in zip(PROJECTIONS, pairs, strict=True):
                other = getattr(exact.experts[layer][expert], projection)
                delta, other_delta = pair.scale * pair.b @ pair.a, other.scale * other.b @ other.a
                torch.testing.assert_close(other_delta, delta, rtol=1e-6, atol=1e-9)


def test_an_adapter_that_is_exported_again_keeps_experts_without_effect(
    graft: Graft, tmp_path: Path, rows: Path
) -> None:
    """Experts that no token reached have an all-zero B; PEFT on transformers 5 wants every expert of a layer."""
    train(tmp_path, rows, lora={"targets": ["experts"], "rank": 4})
    adapter, again, few = tmp_path / "out" / "adapter", tmp_path / "again", tmp_path / "few"
    idle = [key for key, tensor in adapter_tensors(adapter).items() if "lora_B" in key and not tensor.any()]
    assert idle, "some experts saw no token"
    assert graft("export", adapter, "--base", MODEL, "--out", again, "--dtype", "float32").status == 0
    before, after = adapter_tensors(adapter), adapter_tensors(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items() if "lora_B" in key)
    merged = graft("export", adapter, "--base", MODEL, "--out", few, "--merge")
    assert merged.status == 0 and f"with {(len(before) // 2) - len(idle)} weights changed" in merged.out


def test_an_earlier_checkpoint_is_another_adapter(graft: Graft, tmp_path: Path, rows: Path) -> None:
    train(tmp_path, rows)
    for step in (2, 4):
        checkpoint = tmp_path / "out" / "checkpoints" / f"step-{step:08d}"
        said = graft("export", checkpoint, "--base", MODEL, "--out", tmp_path / str(step))
        assert said.status == 0 and f"a checkpoint after step {step}" in said.err
    earlier, later = adapter_tensors(tmp_path / "2"), adapter_tensors(tmp_path / "4")
    assert any(not torch.equal(tensor, later[key]) for key, tensor in earlier.items())


def test_a_damaged_checkpoint_is_not_exported(graft: Graft, tmp_path: Path, rows: Path) -> None:
    train(tmp_path, rows)
    checkpoint = tmp_path / "out" / "checkpoints" / "step-00000004"
    tensors = next(checkpoint.glob("*.distcp"))
    tensors.write_bytes(tensors.read_bytes()[:-50])
    said = graft("export", checkpoint, "--base", MODEL, "--out", tmp_path / "exported")
    assert said.status == 1 and len(said.messages) == 1 and "Traceback" not in said.err
    assert f"{tensors.name} is not what was written; move it away" in said.messages[0]
    assert not (tmp_path / "exported").exists()
