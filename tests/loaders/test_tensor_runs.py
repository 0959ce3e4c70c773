"""Files are read a run of tensors at a time: each tensor is what safetensors' own reader gives, in its own place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loaders import tensor_runs
from loaders.adapter_folder import AdapterFolder
from loaders.errors import AdapterError
from loaders.safetensors_file import SafetensorsFile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 3), (3, 2), (5,), (1, 2, 2), (7, 1)]
NAMES = st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.booleans()), min_size=1, max_size=12)


def _folder(path: Path, tensors: dict[str, torch.Tensor]) -> AdapterFolder:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text("{}")
    return AdapterFolder(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=NAMES, times=st.integers(1, 4), max_bytes=st.sampled_from([1, 40, 2**20]))
def test_runs_give_what_the_library_reads(
    tmp_path: Path, drawn: list[tuple[torch.dtype, tuple[int, ...], bool]], times: int, max_bytes: int
) -> None:
    """Whatever repeats in a file, and wherever its runs end."""
    tensors = {
        f"{turn}.{number}": torch.randn(shape).to(dtype)
        for turn in range(times)
        for number, (dtype, shape, _) in enumerate(drawn)
    }
    wanted = {name for name in tensors if drawn[int(name.split(".")[1])][2]}
    with pytest.MonkeyPatch.context() as patch, _folder(tmp_path / "adapter", tensors) as folder:
        patch.setattr(tensor_runs, "MAX_RUN_BYTES", max_bytes)
        runs = folder.runs(wanted)
        contents = folder.read(runs)
    assert [name for run in runs[0] for name in run.names] == [stored.name for stored in folder.tensors]
    assert contents.tensors.keys() == wanted and not contents.zeros and not contents.problems
    expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, tensor in contents.tensors.items():
        assert tensor.is_contiguous() and tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_tensors_that_are_all_zero_or_not_finite_are_told_by_name(tmp_path: Path) -> None:
    tensors = {f"{number}": torch.randn(3, 4) for number in range(6)}
    tensors["0"][0, 0] = 0
    tensors["1"][:] = 0
    tensors["2"][:] = -0.0
    tensors["3"][2, 3] = torch.nan
    tensors["5"][1, 1] = -torch.inf
    with _folder(tmp_path / "adapter", tensors) as folder:
        contents = folder.read(folder.runs(set(tensors)))
    assert contents.zeros == {"1", "2"}
    assert contents.problems == ["3: contains NaN", "5: contains infinite values"]


def test_what_is_not_wanted_is_hashed_and_not_kept(tmp_path: Path) -> None:
    tensors = {name: torch.full((4,), torch.nan) for name in "abc"}
    digests = []
    for wanted in (set(tensors), {"b"}, set()):
        with _folder(tmp_path / "adapter", tensors) as folder:
            contents = folder.read(folder.runs(wanted))
            digests.append(folder.digest)
        assert contents.tensors.keys() == wanted and len(contents.problems) == len(wanted)
    assert len(set(digests)) == 1


def test_a_file_that_becomes_shorter_is_refused(tmp_path: Path) -> None:
    with _folder(tmp_path / "adapter", {"a": torch.ones(1000)}) as folder:
        runs = folder.runs({"a"})
        with (tmp_path / "adapter" / "adapter_model.safetensors").open("r+b") as file:
            file.truncate(500)
        with pytest.raises(AdapterError, match="became shorter while it was read"):
            folder.read(runs)


def test_a_piece_is_seen_by_the_observer_as_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0)}, tmp_path / "x.safetensors")
    seen: list[bytes] = []
    with (tmp_path / "x.safetensors").open("rb") as file, SafetensorsFile(os.dup(file.fileno()), "x") as opened:
        stored = opened.tensors[0]
        raw = opened.read_bytes(stored.offset, stored.num_bytes, lambda view: seen.append(bytes(view)))
    assert seen == [raw.numpy().tobytes()] and torch.equal(raw.view(torch.float32), torch.arange(4.0))
