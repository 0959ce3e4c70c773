"""MindSpeed-LLM shards of any parallel layout give one and the same adapter; what does not fit is refused."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loader_builders import assert_same_deltas, our_deltas
from safetensors.torch import save_file
from torch import nn

from loaders.adapter import load_adapter
from loaders.errors import AdapterError
from loaders.megatron import MegatronSettings, is_megatron, load_megatron
from tests.loaders.formats.megatron_shards import ALPHA, LAYERS, RANK, Whole, save_shards, targets, whole

GIVEN = MegatronSettings(RANK, ALPHA)


def refusal(path: Path, given: MegatronSettings = GIVEN) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        load_megatron(path, targets(), given)
    return caught.value


def without_qkv(made: Whole) -> Whole:
    """linear_qkv cannot be told apart once it is cut."""
    made.factors = {name: factor for name, factor in made.factors.items() if "linear_qkv" not in name}
    made.deltas = {name: delta for name, delta in made.deltas.items() if "q_a_proj" not in name and "kv_a" not in name}
    return made


@pytest.mark.parametrize("is_grouped", [True, False])
@pytest.mark.parametrize(
    ("tp", "stages", "ep"),
    [(1, (4,), 1), (1, (2, 2), 1), (1, (4,), 2), (1, (1, 3), 4), (2, (4,), 1), (2, (3, 1), 2)],
)
def test_every_parallel_layout_gives_the_same_weights(
    tmp_path: Path, is_grouped: bool, tp: int, stages: tuple[int, ...], ep: int
) -> None:
    made = whole(is_grouped=is_grouped) if tp == 1 else without_qkv(whole(is_grouped=is_grouped))
    path = save_shards(tmp_path, made, tp=tp, stages=stages, ep=ep)
    weights = load_megatron(path, targets(), GIVEN)
    assert_same_deltas(our_deltas(weights), made.deltas, 1e-4)
    assert weights.evidence[0] == f"mp_rank_* folders of tp {tp}, pp {len(stages)}, ep {ep}"
    assert weights.skipped == ((f"{tp * len(stages) * ep} tensors", "weights of the base, not read"),)


def test_gate_and_up_keep_their_common_factor(tmp_path: Path) -> None:
    weights = load_megatron(save_shards(tmp_path, whole()), targets(), GIVEN)
    expert = weights.experts[1][0]
    assert expert.gate is not None and expert.up is not None
    assert expert.gate.a.data_ptr() == expert.up.a.data_ptr()


def test_a_folder_of_an_iteration_and_safetensors_shards_are_read_too(tmp_path: Path) -> None:
    made = whole()
    folder = save_shards(tmp_path, made) / "iter_0000020"
    assert is_megatron(folder)
    model = torch.load(folder / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)["model"]
    shutil.rmtree(folder / "mp_rank_00")
    (folder / "mp_rank_00").mkdir()
    save_file({name: tensor.data.clone() for name, tensor in model.items()}, folder / "mp_rank_00/lora.safetensors")
    assert_same_deltas(our_deltas(load_megatron(folder, targets(), GIVEN)), made.deltas, 1e-4)


def test_tensors_that_are_views_of_a_buffer_are_read_as_what_they_are(tmp_path: Path) -> None:
    """Parameters often lie in one flat buffer, and may be stored transposed."""
    made = whole()
    folder = save_shards(tmp_path, made) / "iter_0000020" / "mp_rank_00"
    state = torch.load(folder / "model_optim_rng.pt", weights_only=False)
    buffer = torch.cat([tensor.data.flatten() for tensor in state["model"].values()])
    first = 0
    for name, tensor in state["model"].items():
        view = buffer[first : first + tensor.numel()].view(tensor.shape)
        first += tensor.numel()
        state["model"][name] = view.T.contiguous().T if "linear_proj" in name else view
    torch.save(state, folder / "model_optim_rng.pt")
    assert_same_deltas(our_deltas(load_megatron(tmp_path, targets(), GIVEN)), made.deltas, 1e-4)


@pytest.mark.parametrize("wrong_rank", [1, 3, 4])
def test_a_rank_that_does_not_fit_the_tensors_is_refused(tmp_path: Path, wrong_rank: int) -> None:
    error = refusal(save_shards(tmp_path, whole()), MegatronSettings(wrong_rank, ALPHA))
    assert any("weight1" in problem for problem in error.problems)
    assert any(f"--rank {wrong_rank}" in problem for problem in error.problems)


def test_missing_processes_are_named(tmp_path: Path) -> None:
    path = save_shards(tmp_path, whole(), stages=(2, 2), ep=2)
    shutil.rmtree(path / "iter_0000020" / "mp_rank_00_001_001")
    assert "3 mp_rank_* folders, the ranks in their names need 1 x 2 x 2 (tp, pp, ep)" in str(refusal(path))


def test_stages_that_do_not_add_up_to_the_base_are_refused(tmp_path: Path) -> None:
    path = save_shards(tmp_path, whole(), stages=(1, 1, 2), ep=1)
    shutil.rmtree(path / "iter_0000020" / "mp_rank_00_002")
    assert f"the base has {LAYERS}" in str(refusal(path))


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    path = save_shards(tmp_path, without_qkv(whole()), tp=2)
    file = path / "iter_0000020" / "mp_rank_01" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    for name, tensor in state["model"].items():
        if "weight1_lora_a" in name or "linear_proj.lora_B" in name:
            state["model"][name] = nn.Parameter(tensor.data + 1)
    torch.save(state, file)
    problems = refusal(path).problems
    assert any("weight1: lora_A differs between tensor-parallel processes" in problem for problem in problems)
    assert any("linear_proj: lora_B differs between tensor-parallel processes" in problem for problem in problems)


def test_names_that_are_not_known_are_problems(tmp_path: Path) -> None:
    made = whole()
    made.factors["decoder.layers.1.mlp.router.lora_A.default.weight"] = torch.ones(2, 2)
    assert "router.lora_A.default.weight: not a LoRA factor" in refusal(save_shards(tmp_path, made)).problems[0]


def test_attention_cut_over_tensor_parallel_processes_is_refused(tmp_path: Path) -> None:
    problems = refusal(save_shards(tmp_path, whole(), tp=2)).problems
    assert len(problems) == LAYERS
    assert all("linear_qkv split over tensor-parallel processes" in problem for problem in problems)


def test_loading_shards_as_an_adapter_names_the_command_that_joins_them(tmp_path: Path) -> None:
    path = save_shards(tmp_path, whole()) / "iter_0000020"
    with pytest.raises(AdapterError, match="make one adapter of them with `graft convert`"):
        load_adapter(path, targets())


class Trap:
    """An object whose unpickling runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


def test_a_pickle_that_would_run_a_command_runs_nothing(tmp_path: Path) -> None:
    made = whole()
    file = save_shards(tmp_path, made) / "iter_0000020" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    mark = tmp_path / "it-ran"
    torch.save({"trap": Trap(f"touch {mark}"), **state}, file)
    assert_same_deltas(our_deltas(load_megatron(tmp_path, targets(), GIVEN)), made.deltas, 1e-4)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists(), "the trap itself does not work"


def small_file(tmp_path: Path) -> Path:
    folder = tmp_path / "mp_rank_00"
    folder.mkdir(parents=True, exist_ok=True)
    name = "decoder.layers.0.self_attention.linear_proj.lora_{}.default.weight"
    model = {name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(12, 2)}
    torch.save({"model": model, "args": argparse.Namespace(a=1)}, folder / "model_optim_rng.pt")
    return folder / "model_optim_rng.pt"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_shard_with_broken_bytes_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    file = small_file(tmp_path)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.binary(max_size=4))
        content[position : position + data.draw(st.integers(0, 4))] = piece
    file.write_bytes(bytes(content))
    with contextlib.suppress(AdapterError):
        load_megatron(tmp_path, targets(), GIVEN)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_pickle_of_any_opcodes_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    file = small_file(tmp_path)
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol=2).dump({"model": {"a": [1, (2, 3)], "b": {"c": None}}, "x": {4, 5}})
    good = bytearray(buffer.getvalue())
    opcodes = st.sampled_from([*(bytes([code]) for code in b"(012RQbust}]\x81"), b"h\x00"])
    for _ in range(data.draw(st.integers(1, 5))):
        position = data.draw(st.integers(2, len(good) - 1))
        good[position:position] = data.draw(opcodes)
    archive = torch._C.PyTorchFileWriter(str(file))
    archive.write_record("data.pkl", bytes(good), len(good))
    archive.write_end_of_file()
    with pytest.raises(AdapterError):
        load_megatron(tmp_path, targets(), GIVEN)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "not a file of torch.save"), (b"PK\3\4", "not a file of torch.save"), (b"\x80\2}.", "not a file")],
)
def test_files_of_other_kinds_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    small_file(tmp_path).write_bytes(content)
    assert words in str(refusal(tmp_path))
