"""The files of an adapter directory: which are read, which are refused, and the digest of the bytes read.

Files are opened once, relative to the directory, without following symbolic links; what is hashed is what is parsed.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from loaders.errors import AdapterError
from loaders.finite import is_finite, non_finite
from loaders.json_file import parse_json_object
from loaders.safetensors_file import SafetensorsFile
from loaders.tensor_runs import Run, runs_of
from loaders.zeros import is_zero

CONFIG_FILE = "adapter_config.json"
SINGLE_FILE = "adapter_model.safetensors"
ESFT_CONFIG_FILE = "expert_cfg.json"
CARD_FILE = "README.md"
MAX_CONFIG_BYTES = 1024 * 1024
MAX_HEADER_BYTES = 16 * 1024 * 1024
_SHARD = re.compile(r"adapter_model-(\d+)-of-(\d+)\.safetensors")
_MODEL_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_CARD_TAG = re.compile(rb"(?im)^\s*-\s*['\"]?unsloth['\"]?\s*$")
_MAX_SHARDS = 10_000
_MAX_CARD_BYTES = 64 * 1024
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Written beside the weights by training frameworks for resuming; never opened here.
_TRAINER_STATE = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler|rng_state)[\w-]*\.(bin|pt|pth)")


@dataclass(frozen=True)
class Contents:
    """Tensors by key, the keys of those that are all zero, and a sentence for each that holds NaN or infinities."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    zeros: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


class AdapterFolder:
    """An opened adapter directory: `config`, `tensors` (headers only) and `skipped`; use it in `with`.

    `config_file` names the file that makes the directory an adapter: PEFT's, or ESFT's with its full weights.
    """

    def __init__(self, path: Path, max_bytes: int | None = None, config_file: str = CONFIG_FILE) -> None:
        """Open and check all files; raises AdapterError with every problem."""
        self.path = Path(path)
        self._config_file = config_file
        self.skipped: list[tuple[str, str]] = []
        self._stack = ExitStack()
        self._hashes: list[tuple[str, int, Future[str]]] = []
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-digest")
        try:
            self._open(max_bytes)
        except BaseException:
            self._hasher.shutdown(wait=False)
            self._stack.close()
            raise

    def __enter__(self) -> "AdapterFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown(wait=False)
        self._stack.close()

    def _open(self, max_bytes: int | None) -> None:
        try:
            self._dir_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as cause:
            raise AdapterError(f"{self.path}: not an adapter directory ({cause.strerror})") from None
        self._stack.callback(os.close, self._dir_fd)
        names = sorted(os.listdir(self._dir_fd))
        problems = _refused_files(names)
        weights = self._weight_files(names, problems)
        try:
            self.config = self._read_config()
        except AdapterError as error:
            if not problems:
                raise
            problems.append(error.headline.removeprefix(f"{self.path}: "))
        if problems:
            raise AdapterError(f"{self.path}: adapter refused", problems)
        fds = [self._open_file(name) for name in weights]
        total_bytes = sum(os.fstat(fd).st_size for fd in fds)
        if max_bytes is not None and total_bytes > max_bytes:
            raise AdapterError(f"{self.path}: {total_bytes} bytes of weights, at most {max_bytes} are allowed")
        for fd in fds:
            self._hasher.submit(_read_ahead, fd)
        self._files = [
            SafetensorsFile(os.dup(fd), name, error=AdapterError, max_header_bytes=MAX_HEADER_BYTES)
            for fd, name in zip(fds, weights, strict=True)
        ]
        for file in self._files:
            self._stack.callback(file.close)
        self.tensors = tuple(chain.from_iterable(file.tensors for file in self._files))

    def _weight_files(self, names: list[str], problems: list[str]) -> list[str]:
        if self._config_file not in names:
            raise AdapterError(f"{self.path}: no {self._config_file}{self._where_else(names)}")
        if self._config_file == ESFT_CONFIG_FILE:
            return self._all_safetensors(names, problems)
        shards = [(match, name) for name in names if (match := _SHARD.fullmatch(name))]
        if SINGLE_FILE in names:
            weights = [SINGLE_FILE]
        elif shards:
            weights = [name for _, name in shards]
            problems += _missing_shards([match for match, _ in shards], SINGLE_FILE)
        else:
            weights = []
            problems.append(f"no {SINGLE_FILE} in the directory{self._where_else(names)}")
        for name in names:
            if name.endswith(".safetensors") and name not in weights:
                self.skipped.append((name, "a file that is not part of the adapter"))
            elif _TRAINER_STATE.fullmatch(name):
                self.skipped.append((name, "state for resuming training, never opened"))
        return weights

    def _all_safetensors(self, names: list[str], problems: list[str]) -> list[str]:
        """ESFT's own loader takes every safetensors file of the directory."""
        weights = [name for name in names if name.endswith(".safetensors")]
        if not weights:
            problems.append("no safetensors file in the directory")
        shards = [match for name in weights if (match := _MODEL_SHARD.fullmatch(name))]
        problems += _missing_shards(shards, "model.safetensors")
        return weights

    def _where_else(self, names: list[str]) -> str:
        checkpoints = [(int(match[1]), name) for name in names if (match := _CHECKPOINT.fullmatch(name))]
        if checkpoints:
            return f"; it holds training checkpoints, load the newest one: {self.path / max(checkpoints)[1]}"
        inner = [name for name in names if (self.path / name / CONFIG_FILE).is_file()]
        if inner:
            return f"; adapters lie in its subdirectories: {', '.join(inner[:5])}"
        if ESFT_CONFIG_FILE in names:
            return "; an ESFT adapter (full weights of chosen experts, not LoRA), which no LoRA file can express"
        if any(name.startswith("mp_rank_") for name in names):
            return "; shards of Megatron or MindSpeed-LLM, make one adapter of them with `graft convert`"
        return ""

    def _open_file(self, name: str) -> int:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=self._dir_fd)
        except OSError as cause:
            reason = "a symbolic link" if cause.errno == errno.ELOOP else str(cause.strerror)
            raise AdapterError(f"{self.path}: {name} cannot be opened ({reason}); files must be regular ones") from None
        self._stack.callback(os.close, fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise AdapterError(f"{self.path}: {name} is not a regular file")
        return fd

    def _read_config(self) -> dict[str, Any]:
        name = self._config_file
        fd = self._open_file(name)
        data = self.config_bytes = os.pread(fd, MAX_CONFIG_BYTES + 1, 0)
        if len(data) > MAX_CONFIG_BYTES:
            raise AdapterError(f"{self.path}: {name} is larger than {MAX_CONFIG_BYTES} bytes")
        self._hashes.append((name, len(data), self._hasher.submit(hashlib.sha256(data).hexdigest)))
        return parse_json_object(data, f"{self.path}: {name}", AdapterError)

    @property
    def b_order_note(self) -> str | None:
        """What Graft's own files of stacks say of lora_B's columns in their metadata: `rank_major`."""
        notes = [str(file.metadata.get("lora_B", "")) for file in self._files]
        return "rank_major" if notes and all(note.endswith("(rank_major)") for note in notes) else None

    def is_unsloth_card(self) -> bool:
        """Whether README.md has the tag that Unsloth gives its adapters; a card that cannot be read says nothing."""
        if CARD_FILE not in os.listdir(self._dir_fd):
            return False
        try:
            fd = self._open_file(CARD_FILE)
        except AdapterError:
            return False
        return _CARD_TAG.search(os.pread(fd, _MAX_CARD_BYTES, 0)) is not None

    @property
    def headers(self) -> tuple[bytes, ...]:
        """The header of each file of weights, which says what is in it."""
        return tuple(file.header_bytes for file in self._files)

    def runs(self, wanted: Set[str]) -> tuple[tuple[Run, ...], ...]:
        """For each file, what is read of it in one go, if these tensors are wanted."""
        return tuple(runs_of(file.tensors, wanted) for file in self._files)

    def read(self, runs: Sequence[Sequence[Run]]) -> Contents:
        """Read and hash all files once; the tensors must not be changed.

        Hashing goes on in a thread, beside the reading and what is done with the tensors; `digest` waits for it.
        """
        contents = Contents()
        for file, own in zip(self._files, runs, strict=True):
            sha = hashlib.sha256(file.header_bytes)
            for run in own:
                if run.dtype is None:
                    file.observe(run.offset, run.num_bytes, partial(self._hash_now, sha.update))
                    continue
                memory = file.read_bytes(run.offset, run.num_bytes, partial(self._hash, sha.update)).view(run.dtype)
                tensors = run.split(memory)
                contents.tensors.update(tensors)
                contents.zeros.update(name for name in run.begin_with_zero(memory) if is_zero(tensors[name]))
                if not is_finite(memory):
                    contents.problems.extend(non_finite({name: tensors[name] for name in run.names}))
            self._hashes.append((file.label, file.num_bytes, self._hasher.submit(sha.hexdigest)))
        return contents

    def _hash(self, update: Callable[[memoryview], None], view: memoryview) -> Future[None]:
        return self._hasher.submit(update, view)

    def _hash_now(self, update: Callable[[memoryview], None], view: memoryview) -> None:
        """For bytes whose place is used again."""
        self._hash(update, view).result()

    @property
    def digest(self) -> str:
        """`sha256:` of the sorted lines `name size sha256` of the files read; complete after `read`."""
        hashes = sorted((name, size, sha.result()) for name, size, sha in self._hashes)
        lines = "".join(f"{name} {size} {sha}\n" for name, size, sha in hashes)
        return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _read_ahead(fd: int) -> None:
    """Let the disk work while headers are parsed and checked, where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)


def folder_digest(path: Path) -> str:
    """The digest of an adapter's folder as a load would find it; raises AdapterError."""
    is_esft = (path / ESFT_CONFIG_FILE).is_file() and not (path / CONFIG_FILE).is_file()
    with AdapterFolder(path, None, ESFT_CONFIG_FILE if is_esft else CONFIG_FILE) as folder:
        folder.read(folder.runs(set()))
        return folder.digest


def _missing_shards(shards: list[re.Match[str]], whole: str) -> list[str]:
    """The shards that are not there, of the number that the first one's name states."""
    if not shards:
        return []
    total = shards[0][2].lstrip("0")
    if len(total) > len(str(_MAX_SHARDS)) or int(total or 0) > _MAX_SHARDS:
        return [f"{shards[0][0]}: more than {_MAX_SHARDS} shards"]
    missing = set(range(1, int(total or 0) + 1)) - {int(shard[1]) for shard in shards}
    return [f"shard {number} of {total} of {whole} is missing" for number in sorted(missing)]


def _refused_files(names: list[str]) -> list[str]:
    return [
        f"{name}: pickled weights are never read and not accepted beside safetensors; remove or convert them"
        for name in names
        if name.lower().endswith(_PICKLES) and not _TRAINER_STATE.fullmatch(name)
    ]
