"""The files of an adapter directory: which are read, which are refused, and the digest of the bytes read.

Files are opened once, relative to the directory, without following symbolic links; what is hashed is what is parsed.
"""

import errno
import hashlib
import os
import re
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loaders.errors import AdapterError
from loaders.json_file import parse_json_object
from loaders.safetensors_file import SafetensorsFile, StoredTensor

CONFIG_FILE = "adapter_config.json"
SINGLE_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1024 * 1024
MAX_HEADER_BYTES = 16 * 1024 * 1024
_SHARD = re.compile(r"adapter_model-(\d+)-of-(\d+)\.safetensors")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Written beside the weights by training frameworks for resuming; never opened here.
_TRAINER_STATE = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler|rng_state)[\w-]*\.(bin|pt|pth)")


@dataclass(frozen=True)
class AdapterTensor:
    """A tensor of the adapter and the number of the file it is in."""

    stored: StoredTensor
    file: int


class AdapterFolder:
    """An opened adapter directory: `config`, `tensors` (headers only) and `skipped`; use it in `with`."""

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        """Open and check all files; raises AdapterError with every problem."""
        self.path = Path(path)
        self.skipped: list[tuple[str, str]] = []
        self._stack = ExitStack()
        self._hashes: list[tuple[str, int, str]] = []
        try:
            self._open(max_bytes)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "AdapterFolder":
        return self

    def __exit__(self, *_: object) -> None:
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
        if problems:
            raise AdapterError(f"{self.path}: adapter refused", problems)
        self.config = self._read_config()
        fds = [self._open_file(name) for name in weights]
        total_bytes = sum(os.fstat(fd).st_size for fd in fds)
        if max_bytes is not None and total_bytes > max_bytes:
            raise AdapterError(f"{self.path}: {total_bytes} bytes of weights, at most {max_bytes} are allowed")
        self._files = [
            SafetensorsFile(os.dup(fd), name, error=AdapterError, max_header_bytes=MAX_HEADER_BYTES)
            for fd, name in zip(fds, weights, strict=True)
        ]
        for file in self._files:
            self._stack.callback(file.close)
        self.tensors = tuple(
            AdapterTensor(stored, number) for number, file in enumerate(self._files) for stored in file.tensors
        )

    def _weight_files(self, names: list[str], problems: list[str]) -> list[str]:
        if CONFIG_FILE not in names:
            raise AdapterError(f"{self.path}: no {CONFIG_FILE}{self._where_else(names)}")
        shards = [(match, name) for name in names if (match := _SHARD.fullmatch(name))]
        if SINGLE_FILE in names:
            weights = [SINGLE_FILE]
        elif shards:
            weights = [name for _, name in shards]
            numbers = {int(match[1]) for match, _ in shards}
            for number in sorted(set(range(1, int(shards[0][0][2]) + 1)) - numbers):
                problems.append(f"shard {number} of {int(shards[0][0][2])} of {SINGLE_FILE} is missing")
        else:
            weights = []
            problems.append(f"no {SINGLE_FILE} in the directory{self._where_else(names)}")
        for name in names:
            if name.endswith(".safetensors") and name not in weights:
                self.skipped.append((name, "a file that is not part of the adapter"))
            elif _TRAINER_STATE.fullmatch(name):
                self.skipped.append((name, "state for resuming training, never opened"))
        return weights

    def _where_else(self, names: list[str]) -> str:
        checkpoints = [(int(match[1]), name) for name in names if (match := _CHECKPOINT.fullmatch(name))]
        if checkpoints:
            return f"; it holds training checkpoints, load the newest one: {self.path / max(checkpoints)[1]}"
        inner = [name for name in names if (self.path / name / CONFIG_FILE).is_file()]
        if inner:
            return f"; adapters lie in its subdirectories: {', '.join(inner[:5])}"
        if "expert_cfg.json" in names:
            return "; an ESFT directory (full weights of chosen experts), which is not supported"
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
        fd = self._open_file(CONFIG_FILE)
        data = os.pread(fd, MAX_CONFIG_BYTES + 1, 0)
        if len(data) > MAX_CONFIG_BYTES:
            raise AdapterError(f"{self.path}: {CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
        self._hashes.append((CONFIG_FILE, len(data), hashlib.sha256(data).hexdigest()))
        return parse_json_object(data, f"{self.path}: {CONFIG_FILE}", AdapterError)

    def read(self, wanted: set[str]) -> dict[str, torch.Tensor]:
        """Read and hash all files once; returns the `wanted` tensors by key, each in memory of its own."""
        tensors: dict[str, torch.Tensor] = {}
        for file in self._files:
            sha = hashlib.sha256(file.header_bytes)
            for stored in file.tensors:
                if stored.name in wanted:
                    tensors[stored.name] = file.read(stored, sha.update)
                else:
                    file.observe(stored, sha.update)
            self._hashes.append((file.label, file.num_bytes, sha.hexdigest()))
        return tensors

    @property
    def digest(self) -> str:
        """`sha256:` of the sorted lines `name size sha256` of the files read; complete after `read`."""
        lines = "".join(f"{name} {size} {sha}\n" for name, size, sha in sorted(self._hashes))
        return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def folder_digest(path: Path) -> str:
    """The digest of an adapter's folder as a load would find it; raises AdapterError."""
    with AdapterFolder(path, None) as folder:
        folder.read(set())
        return folder.digest


def _refused_files(names: list[str]) -> list[str]:
    return [
        f"{name}: pickled weights are never read and not accepted beside safetensors; remove or convert them"
        for name in names
        if name.lower().endswith(_PICKLES) and not _TRAINER_STATE.fullmatch(name)
    ]
