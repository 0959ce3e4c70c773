"""Which files of a model directory hold which tensor: single-file and sharded forms, names put in their plain form."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loaders.errors import CheckpointError
from loaders.json_file import read_json_object
from loaders.safetensors_file import SafetensorsFile, StoredTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 128 * 1024 * 1024
_TEXT_PREFIX = re.compile(r"^(?:model\.)?language_model\.(?P<rest>.+)$")


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the checkpoint: its plain name, where it lies, and the number of its shard."""

    name: str
    stored: StoredTensor
    shard: int


@dataclass(frozen=True)
class BaseFiles:
    """The shards of a checkpoint in reading order and every tensor they hold."""

    shards: tuple[Path, ...]
    tensors: tuple[BaseTensor, ...]
    problems: tuple[str, ...]
    multimodal: bool

    def open(self, shard: int) -> SafetensorsFile:
        """Open one shard; the caller closes it."""
        return open_shard(self.shards[shard])


def plain_name(name: str) -> str:
    """`language_model.model.x` and `model.language_model.x` (multimodal checkpoints) -> `model.x`."""
    match = _TEXT_PREFIX.match(name)
    if match is None:
        return name
    rest = match["rest"]
    return rest if rest.startswith(("model.", "lm_head.")) else f"model.{rest}"


def open_shard(path: Path) -> SafetensorsFile:
    """Open and check one safetensors file; raises CheckpointError naming it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as cause:
        raise CheckpointError(f"{path}: cannot be opened ({cause.strerror})") from None
    return SafetensorsFile(fd, str(path), error=CheckpointError)


def find_base_files(model_dir: Path) -> BaseFiles:
    """Read the index and every header; files that are missing or broken become `problems`, not exceptions."""
    index = model_dir / INDEX_FILE
    problems: list[str] = []
    weight_map: dict[str, str] | None = None
    if index.is_file():
        weight_map = _read_weight_map(index)
        shards = [model_dir / name for name in sorted(set(weight_map.values()))]
    elif (model_dir / SINGLE_FILE).is_file():
        shards = [model_dir / SINGLE_FILE]
    else:
        raise CheckpointError(_nothing_found(model_dir))

    found: dict[str, BaseTensor] = {}
    readable: set[str] = set()
    for number, path in enumerate(shards):
        if not path.is_file():
            problems.append(f"{path.name}: named by {INDEX_FILE} but not in the directory (unfinished download?)")
            continue
        try:
            with open_shard(path) as file:
                _collect(file.tensors, number, path.name, weight_map, found, problems)
        except CheckpointError as cause:
            problems.append(str(cause))
            continue
        readable.add(path.name)
    problems.extend(_absent(weight_map, readable, found))
    multimodal = any(plain_name(tensor.stored.name) != tensor.stored.name for tensor in found.values())
    return BaseFiles(tuple(shards), tuple(found.values()), tuple(problems), multimodal)


def _collect(
    tensors: tuple[StoredTensor, ...],
    shard: int,
    file_name: str,
    weight_map: dict[str, str] | None,
    found: dict[str, BaseTensor],
    problems: list[str],
) -> None:
    for stored in tensors:
        if weight_map is not None and weight_map.get(stored.name, file_name) != file_name:
            continue  # a copy left in another shard: the index decides
        name = plain_name(stored.name)
        if name in found:
            problems.append(f"{name}: stored twice ({found[name].stored.name} and {stored.name} in {file_name})")
            continue
        found[name] = BaseTensor(name, stored, shard)


def _absent(weight_map: dict[str, str] | None, readable: set[str], found: dict[str, BaseTensor]) -> Iterator[str]:
    for name, file_name in (weight_map or {}).items():
        if file_name in readable and plain_name(name) not in found:
            yield f"{name}: listed for {file_name} in {INDEX_FILE}, but that file does not hold it"


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index, MAX_INDEX_BYTES, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object that names a file for each tensor")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or not file_name:
            raise CheckpointError(f"{index}: weight_map of {name} must be the name of a file beside the index")
    return weight_map


def _nothing_found(model_dir: Path) -> str:
    if not model_dir.is_dir():
        return f"{model_dir}: not a directory"
    shards = sorted(path.name for path in model_dir.glob("*.safetensors"))
    pickles = sorted(path.name for path in model_dir.glob("*.bin")) + sorted(p.name for p in model_dir.glob("*.pt"))
    if shards:
        cause = f"found {len(shards)} safetensors files such as {shards[0]}, but no index: download {INDEX_FILE} too"
    elif pickles:
        cause = f"found {pickles[0]}: only safetensors are read, convert the weights first"
    else:
        cause = "no safetensors files at all"
    return f"{model_dir}: neither {SINGLE_FILE} nor {INDEX_FILE} ({cause})"
