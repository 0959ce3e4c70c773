"""Checkpoints for resuming: torch.distributed.checkpoint files that any layout can read, whole or not there at all.

A checkpoint is the folder step-NNNNNNNN: factors and Adam's moments by global name (one name for each expert), run.json
(settings, step, experts that are trained) and files.json (size and checksum of every other file).
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from runtime.distributed.mesh import Mesh, barrier, gather_objects
from runtime.trainer.export.folder import force_to_disk, move_into_place
from runtime.trainer.parameters import LoraParameter

PREFIX = "step-"
RUN_FILE, FILES_FILE, TENSORS_FILE = "run.json", "files.json", ".metadata"
MOMENTS = ("exp_avg", "exp_avg_sq")
_CHUNK_BYTES = 1 << 22
_ALONE = "torch.distributed is disabled"  # told of a process that is alone on purpose

logger = logging.getLogger(__name__)


class CheckpointProblem(ValueError):
    """A checkpoint that cannot be written or used; `str()` is the sentence for the user."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands: optimizer steps done, its settings, the experts that are trained (None: all).

    `inputs`: digests of what the settings only name (`fingerprint`). `metrics`: its newest numbers, for the model card.
    """

    step: int
    settings: Mapping[str, Any]
    experts: Mapping[int, tuple[int, ...]] | None
    inputs: Mapping[str, str]
    metrics: Mapping[str, float]
    best_loss: float | None = None
    best_step: int | None = None


def save_checkpoint(
    folder: Path,
    state: RunState,
    parameters: Sequence[LoraParameter],
    optimizer: torch.optim.Optimizer,
    mesh: Mesh,
) -> Path:
    """Write under a temporary name, force to disk, rename. Raises CheckpointProblem on every process if one cannot."""
    path = folder / f"{PREFIX}{state.step:08d}"
    partial = folder / f".{path.name}.partial"
    problem = _tried(lambda: _prepare(partial), mesh.world.rank == 0)
    _raise_any(problem, path, partial, mesh)
    tensors = _state_dict(parameters, optimizer, mesh)
    _raise_any(_tried(lambda: _write(partial, tensors, mesh)), path, partial, mesh)
    _raise_any(_tried(lambda: _finish(partial, path, state), mesh.world.rank == 0), path, partial, mesh)
    return path


def open_checkpoint(path: Path, mesh: Mesh) -> RunState:
    """Check every file and read run.json; raises CheckpointProblem, on all processes what one of them met."""
    _raise_problem(_tried(lambda: check_files(path), mesh.world.rank == 0), mesh)
    _raise_problem(_tried(lambda: read_run_state(path)), mesh)
    return read_run_state(path)


def read_run_state(path: Path) -> RunState:
    """What run.json says; raises CheckpointProblem if the folder is no whole checkpoint."""
    try:
        raw = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        experts = raw["experts"]
        kept = None if experts is None else {int(layer): tuple(chosen) for layer, chosen in experts.items()}
        inputs, metrics = dict(raw["inputs"]), dict(raw["metrics"])
        step, settings = int(raw["step"]), dict(raw["settings"])
        return RunState(step, settings, kept, inputs, metrics, raw["best_loss"], raw["best_step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointProblem(_broken(path, f"{RUN_FILE} is missing or damaged")) from None


def check_files(path: Path) -> None:
    """Compare every file with its size and checksum; raises CheckpointProblem naming the first that differs."""
    if not path.is_dir():
        raise CheckpointProblem(f"there is no checkpoint {path}; {_instead(path)}")
    try:
        files = json.loads((path / FILES_FILE).read_text(encoding="utf-8"))
        pairs = [(str(name), int(size), int(checksum)) for name, (size, checksum) in files.items()]
    except (OSError, ValueError, TypeError, AttributeError):
        raise CheckpointProblem(_broken(path, f"{FILES_FILE} is missing or damaged")) from None
    unlisted = {RUN_FILE, TENSORS_FILE} - files.keys()
    if unlisted:
        raise CheckpointProblem(_broken(path, f"{FILES_FILE} does not list {min(unlisted)}"))
    for name, size, checksum in pairs:
        file = path / name
        if not file.is_file():
            raise CheckpointProblem(_broken(path, f"{name} is missing"))
        if file.stat().st_size != size or _file_checksum(file) != checksum:
            raise CheckpointProblem(_broken(path, f"{name} is not what was written"))


def load_checkpoint(
    path: Path, step: int, parameters: Sequence[LoraParameter], optimizer: torch.optim.Optimizer, mesh: Mesh
) -> None:
    """Fill factors and moments after `step` steps, whatever layout wrote them; raises CheckpointProblem."""
    _make_moments(optimizer, step)
    tensors = _state_dict(parameters, optimizer, mesh)

    def read() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _ALONE)
            dcp_load(tensors, checkpoint_id=str(path), no_dist=mesh.world.handle is None)

    _raise_problem(_tried(read), mesh)


def read_factors(path: Path) -> tuple[RunState, dict[str, Tensor]]:
    """Every factor of a checkpoint, whole, by global name; in one process, without the base."""
    check_files(path)
    state = read_run_state(path)
    reader = FileSystemReader(str(path))
    entries = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith("factor.") and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _ALONE)
        dcp_load(tensors, storage_reader=reader, no_dist=True)
    return state, {name.removeprefix("factor."): tensor for name, tensor in tensors.items()}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; what a killed process left half written is not among them."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / FILES_FILE).is_file())


def good_checkpoints(folder: Path, num_steps: int) -> list[Path]:
    """Those of fewer steps, oldest first: what a run that lost its numbers after `num_steps` steps can go back to."""
    return [path for path in checkpoints(folder) if path.name < f"{PREFIX}{num_steps:08d}"]


def remove_old(folder: Path, step: int, num_kept: int, best_step: int | None) -> None:
    """Of those up to `step` keep the newest and the best; remove the others and what was left half written."""
    earlier = [path for path in checkpoints(folder) if path.name <= f"{PREFIX}{step:08d}"]
    old = [path for path in earlier[:-num_kept] if path.name != f"{PREFIX}{best_step or 0:08d}"]
    for path in (*old, *folder.glob(f".{PREFIX}*")):
        shutil.rmtree(path, ignore_errors=True)


def _state_dict(
    parameters: Sequence[LoraParameter], optimizer: torch.optim.Optimizer, mesh: Mesh
) -> dict[str, Tensor]:
    """Views of all that is saved: DTensors where tp splits, plain tensors for the rest and for each expert."""
    found: dict[str, Tensor] = {}
    device_mesh = None
    if mesh.tp.handle is not None and parameters:
        device_mesh = DeviceMesh.from_group(mesh.tp.handle, parameters[0].tensor.device.type)
    for parameter in parameters:
        moments = optimizer.state[parameter.tensor]
        values = {"factor": parameter.tensor.detach(), **{name: moments[name] for name in MOMENTS}}
        for kind, tensor in values.items():
            if parameter.experts is not None:
                for index, expert in enumerate(parameter.experts):
                    found[f"{kind}.{parameter.expert_name(expert)}"] = tensor[index]
            elif parameter.shard_dim is not None and device_mesh is not None:
                placements = [Shard(parameter.shard_dim)]
                found[f"{kind}.{parameter.name}"] = DTensor.from_local(tensor, device_mesh, placements, run_check=False)
            else:
                found[f"{kind}.{parameter.name}"] = tensor
    return found


def _make_moments(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            moments = {name: torch.zeros_like(tensor) for name in MOMENTS}
            optimizer.state[tensor] = {"step": torch.tensor(float(step), device=tensor.device), **moments}


def _prepare(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write(partial: Path, tensors: dict[str, Tensor], mesh: Mesh) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _ALONE)
        dcp_save(tensors, checkpoint_id=str(partial), no_dist=mesh.world.handle is None)


def _finish(partial: Path, path: Path, state: RunState) -> None:
    experts = None if state.experts is None else {str(layer): list(own) for layer, own in state.experts.items()}
    run = {"step": state.step, "settings": state.settings, "experts": experts, "inputs": state.inputs,
           "metrics": state.metrics, "best_loss": state.best_loss, "best_step": state.best_step}  # fmt: skip
    (partial / RUN_FILE).write_text(json.dumps(run, indent=1), encoding="utf-8")
    names = sorted(file.name for file in partial.iterdir())
    files = {name: ((partial / name).stat().st_size, _file_checksum(partial / name)) for name in names}
    (partial / FILES_FILE).write_text(json.dumps(files, indent=1), encoding="utf-8")
    for file in (*partial.iterdir(), partial):
        force_to_disk(file)
    move_into_place(partial, path)
    shutil.rmtree(partial, ignore_errors=True)  # what was there before


def _file_checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def _tried(work: Any, here: bool = True) -> str | None:
    """Do the work on the processes that shall; what went wrong, in words."""
    if not here:
        return None
    try:
        work()
    except CheckpointProblem as cause:
        return str(cause)
    except OSError as cause:
        return cause.strerror or str(cause)
    except (Exception, CheckpointException) as cause:  # noqa: BLE001 - what torch's writers and readers raise
        return _first_reason(cause)
    return None


def _first_reason(error: BaseException) -> str:
    """The file system's own words inside torch's CheckpointException, which lists what each process raised."""
    causes = [failure[0] for failure in getattr(error, "failures", {}).values()]
    for cause in [*causes, error]:
        text = cause.strerror if isinstance(cause, OSError) else str(cause)
        if text:
            return " ".join(text.split())[:300]
    return type(error).__name__


def _raise_any(problem: str | None, path: Path, partial: Path, mesh: Mesh) -> None:
    try:
        _raise_problem(problem and f"{path}: the checkpoint cannot be written ({problem})", mesh)
    except CheckpointProblem:
        if mesh.world.rank == 0:
            with suppress(OSError):
                shutil.rmtree(partial)
        barrier(mesh.world)
        raise


def _raise_problem(problem: str | None, mesh: Mesh) -> None:
    """All processes raise what one of them met."""
    found = next((other for other in gather_objects(problem, mesh.world) if other), None)
    if found:
        raise CheckpointProblem(str(found))


def _broken(path: Path, what: str) -> str:
    return f"{path} is not a whole checkpoint: {what}; {_instead(path)}"


def _instead(path: Path) -> str:
    others = [other.name for other in checkpoints(path.parent) if other != path] if path.parent.is_dir() else []
    if not others:
        return "there is no other in that folder"
    if path.exists() and path.name > others[-1]:
        return f"move it away, and --resume goes on from {others[-1]}"
    return f"resume from another one ({', '.join(others[-3:])})"
