"""`graft train --dry-run` says what the run really has: trained parameters, and the base on each process."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.distributed.mesh import Group, Mesh, MeshShape
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.config import TrainConfig
from runtime.trainer.config_file import read_config
from runtime.trainer.model import build_stage
from runtime.trainer.plan import plan_run, process_memory
from runtime.trainer.replicas import gradient_norm
from runtime.trainer.stage import mesh_shape
from tests.trainer.runs.demo import MODEL, Graft, write_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "TP2": {"tp": 2},
    "PP2": {"pp": 2},
    "EP2": {"dp": 2, "ep": 2},
    "DP2": {"dp": 2},
    "TP2xDP2": {"tp": 2, "dp": 2},
    "TP2xPP2": {"tp": 2, "pp": 2},
    "PP2xEP2, 1 + 3 layers": {"pp": 2, "dp": 2, "ep": 2, "layers": [1, 3]},
}


def place(shape: MeshShape, rank: int) -> Mesh:
    """The mesh as one process sees it, without any other: sizes and places only."""
    per_stage = shape.dp * shape.tp
    pp, in_stage = divmod(rank, per_stage)
    dp, tp = divmod(in_stage, shape.tp)

    def group(size: int, own: int) -> Group:
        return Group(tuple(range(size)), own, None)

    return Mesh(
        shape,
        world=group(shape.num_processes, rank),
        pp=group(shape.pp, pp),
        dp=group(shape.dp, dp),
        tp=group(shape.tp, tp),
        ep=group(shape.ep, in_stage % shape.ep),
        stage=group(per_stage, in_stage),
        expert_column=group(shape.ep // shape.tp, in_stage % shape.ep // shape.tp),
        expert_replicas=group(per_stage // shape.ep, in_stage // shape.ep),
    )


def make_config(tmp_path: Path, rows: Path, layout: dict[str, Any]) -> TrainConfig:
    changes = {"lora": {"targets": ["all-linear", "lm_head"], "rank": 4}, "parallel": layout, "batch_rows": 4}
    return read_config(write_config(tmp_path / "run.yaml", rows, tmp_path / "out", **changes))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_planned_parameters_of_each_process_are_those_of_its_modules(
    tmp_path: Path, rows: Path, name: str, tied: bool
) -> None:
    config = make_config(tmp_path, rows, LAYOUTS[name])
    base = replace(DeepseekConfig.from_dir(MODEL), tie_word_embeddings=tied)
    plan = plan_run(base, config, 40, 20)
    shape = mesh_shape(config.parallel)
    for rank in range(shape.num_processes):
        mesh = place(shape, rank)
        stage = build_stage(config, base, mesh, torch.device("cpu"))
        own = [parameter for parameter in stage.parameters() if not parameter.requires_grad]
        assert plan.stages[mesh.pp.rank].base_parameters == sum(parameter.numel() for parameter in own), rank
        trained = sum(parameter.tensor.numel() for parameter in stage.lora_parameters())
        assert process_memory(plan, mesh.pp.rank, checkpointing=False).master == 4 * trained, rank
        assert tuple(stage.options.layers) == plan.stages[mesh.pp.rank].layers


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gradient_norm_counts_each_number_of_the_adapter_once(tmp_path: Path, rows: Path, name: str) -> None:
    """With gradients of one everywhere, its square is the number of trained parameters, summed over all processes."""
    config = make_config(tmp_path, rows, LAYOUTS[name])
    base = DeepseekConfig.from_dir(MODEL)
    shape = mesh_shape(config.parallel)
    total = 0.0
    for rank in range(shape.num_processes):
        mesh = place(shape, rank)
        parameters = build_stage(config, base, mesh, torch.device("cpu")).lora_parameters()
        for parameter in parameters:
            parameter.tensor.grad = torch.ones_like(parameter.tensor)
        total += gradient_norm(parameters, mesh) ** 2
    assert total == pytest.approx(sum(tensor.num_parameters for tensor in plan_run(base, config, 40, 20).tensors))


@pytest.mark.parametrize("name", ["experts", "all-linear"])
def test_the_dry_run_counts_the_parameters_that_the_run_trains(
    graft: Graft, tmp_path: Path, rows: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level("INFO", "runtime.trainer")
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out", lora={"targets": [name], "rank": 4}, steps=1)
    said = graft("train", config, "--dry-run")
    assert said.status == 0 and not (tmp_path / "out").exists(), "a dry run leaves nothing"
    planned = re.search(r"([\d,]+) trainable parameters", said.out)
    assert graft("train", config).status == 0
    trained = re.search(r"training ([\d,]+) factors' parameters", caplog.text)
    assert planned and trained and planned[1] == trained[1]
    whole = re.search(r"of the base's ([\d,]+)", said.out)
    assert whole and int(whole[1].replace(",", "")) == num_parameters_on_disk()


def num_parameters_on_disk() -> int:
    from safetensors import safe_open

    total = 0
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            total += int(torch.Size(file.get_slice(key).get_shape()).numel())
    return total
