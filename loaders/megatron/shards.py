"""The folders of a Megatron checkpoint: `mp_rank_TT[_PPP][_EEE]`, one file per process."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from loaders.errors import AdapterError
from loaders.megatron.archive import ShardFile, ShardTensor
from loaders.megatron.names import split_key

_RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3}))?(?:_(\d{3}))?")
_LATEST = "latest_checkpointed_iteration.txt"
_PREFERRED = ("model_optim_rng.pt", "model_rng.pt")
MAX_SHARDS = 4096


@dataclass(frozen=True)
class Place:
    """Which process wrote a file: its tensor, pipeline and expert rank."""

    tp: int
    pp: int
    ep: int


@dataclass(frozen=True)
class ShardGrid:
    """All files of a checkpoint by place, and for each pipeline stage the index of its first layer."""

    files: Mapping[Place, Mapping[str, ShardTensor]]
    tp_size: int
    ep_size: int
    first_layers: tuple[int, ...]

    @property
    def evidence(self) -> str:
        """What the folders' names say."""
        return f"mp_rank_* folders of tp {self.tp_size}, pp {len(self.first_layers)}, ep {self.ep_size}"


def rank_folders(path: Path) -> list[Path]:
    """The mp_rank_* folders at `path`, or of the newest iteration below it; empty if there are none."""
    path = Path(path)
    latest = path / _LATEST
    if latest.is_file():
        text = latest.read_bytes()[:32].decode("ascii", "replace").strip()
        path = path / (f"iter_{int(text):07d}" if text.isdecimal() and text.isascii() else "release")
    if not path.is_dir():
        return []
    return sorted(entry for entry in path.iterdir() if _RANK.fullmatch(entry.name) and entry.is_dir())


def open_grid(folders: list[Path], num_layers: int, stack: ExitStack) -> ShardGrid:
    """Open the file of each folder; raises AdapterError if processes are missing or cannot be told apart."""
    if len(folders) > MAX_SHARDS:
        raise AdapterError(f"{folders[0].parent}: more than {MAX_SHARDS} mp_rank_* folders")
    files = {folder.name: stack.enter_context(ShardFile(_weights_file(folder))).tensors for folder in folders}
    where = str(folders[0].parent)
    numbers = {name: _numbers(name) for name in files}
    lengths = {len(found) for found in numbers.values()}
    if len(lengths) > 1:
        raise AdapterError(f"{where}: mp_rank_* folders of two kinds: {', '.join(sorted(files)[:4])}")
    depths = {name: _num_layers(tensors) for name, tensors in files.items()}
    is_pipeline = lengths == {3} or (lengths == {2} and _second_is_stage(numbers, depths, num_layers, where))
    places = {name: _place(found, is_pipeline) for name, found in numbers.items()}
    sizes = [1 + max(getattr(place, axis) for place in places.values()) for axis in ("tp", "pp", "ep")]
    if len(set(places.values())) != sizes[0] * sizes[1] * sizes[2]:
        raise AdapterError(
            f"{where}: {len(places)} mp_rank_* folders, the ranks in their names need {sizes[0]} x {sizes[1]} x "
            f"{sizes[2]} (tp, pp, ep): some are missing"
        )
    stages = [max(depths[name] for name, place in places.items() if place.pp == stage) for stage in range(sizes[1])]
    if sum(stages) > num_layers or (len(stages) > 1 and sum(stages) != num_layers):
        raise AdapterError(
            f"{where}: LoRA on {'+'.join(map(str, stages))} layers in its pipeline stages, the base has {num_layers}; "
            "where a stage begins is known only if the last layer of each has factors"
        )
    first_layers = tuple(sum(stages[:stage]) for stage in range(len(stages)))
    return ShardGrid({places[name]: tensors for name, tensors in files.items()}, sizes[0], sizes[2], first_layers)


def _second_is_stage(
    numbers: Mapping[str, tuple[int, ...]], depths: Mapping[str, int], num_layers: int, where: str
) -> bool:
    """Of `mp_rank_TT_NNN` the second number is a pipeline stage or an expert rank: the layers inside tell."""
    by_second: dict[int, int] = {}
    for name, found in numbers.items():
        by_second[found[1]] = max(by_second.get(found[1], 0), depths[name])
    if sum(by_second.values()) == num_layers:
        return True
    if set(by_second.values()) == {num_layers}:
        return False
    raise AdapterError(
        f"{where}: the second numbers of mp_rank_TT_NNN are neither pipeline stages nor expert ranks: factors of "
        f"{'+'.join(str(by_second[n]) for n in sorted(by_second))} layers, the base has {num_layers}"
    )


def _numbers(name: str) -> tuple[int, ...]:
    match = _RANK.fullmatch(name)
    return tuple(int(number) for number in match.groups() if number is not None) if match else ()


def _place(numbers: tuple[int, ...], is_pipeline: bool) -> Place:
    tp, *rest = numbers
    pp = rest.pop(0) if is_pipeline and rest else 0
    return Place(tp, pp, rest[0] if rest else 0)


def _num_layers(tensors: Mapping[str, ShardTensor]) -> int:
    return 1 + max((key.layer for name in tensors if (key := split_key(name)) is not None), default=-1)


def _weights_file(folder: Path) -> Path:
    names = sorted(entry.name for entry in folder.iterdir())
    preferred = [name for name in _PREFERRED if name in names]
    weights = preferred or [name for name in names if name.endswith((".pt", ".safetensors"))]
    if len(weights) != 1:
        raise AdapterError(f"{folder}: expected one file with the model's weights, found {len(weights)}")
    return folder / weights[0]
