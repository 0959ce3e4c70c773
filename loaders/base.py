"""Base checkpoints: compare the files with what the model expects, then stream tensors one at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from loaders.base_check import check_base, check_quantisation
from loaders.base_files import BaseFiles, BaseTensor, find_base_files
from loaders.base_types import BaseReport, TensorSpec
from loaders.errors import CheckpointError
from loaders.fp8 import SCALE_SUFFIX, Dequantiser
from loaders.safetensors_file import SafetensorsFile

__all__ = ["BasePlan", "BaseReport", "TensorSpec", "plan_base", "stream_base"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BasePlan:
    """A checkpoint whose names and shapes were found right; `stream` may be called more than once."""

    report: BaseReport
    expected: Mapping[str, TensorSpec]
    files: BaseFiles
    tensors: tuple[BaseTensor, ...]
    scales: Mapping[str, BaseTensor]
    block: tuple[int, int]

    def stream(
        self,
        dtype: torch.dtype,
        progress: Progress | None = None,
        wanted: Callable[[str], bool] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, CPU tensor in `dtype`, or float32 where the spec says so) once each, in file order.

        Holds one tensor and its scale at a time. `wanted(name)` False leaves a tensor unread (another process's
        experts). `progress(done_bytes, total_bytes)` counts bytes of the files. Raises CheckpointError if a file
        changes meanwhile.
        """
        chosen = [tensor for tensor in self.tensors if wanted is None or wanted(tensor.name)]
        total_bytes = sum(self._disk_bytes(tensor) for tensor in chosen)
        done_bytes = 0
        with _Reader(self, dtype, chosen) as reader:
            for tensor in chosen:
                # Nothing here keeps a reference to the yielded tensor while the caller works on it.
                yield tensor.name, reader.load(tensor)
                done_bytes += self._disk_bytes(tensor)
                if progress is not None:
                    progress(done_bytes, total_bytes)

    def _disk_bytes(self, tensor: BaseTensor) -> int:
        scale = self.scales.get(tensor.name)
        return tensor.stored.num_bytes + (scale.stored.num_bytes if scale else 0)


class _Reader:
    """Open shards, and one buffer for all tensors that are converted, so that temporaries do not fragment the heap."""

    def __init__(self, plan: BasePlan, dtype: torch.dtype, tensors: list[BaseTensor]) -> None:
        self._plan = plan
        self._dtype = dtype
        self._opened: dict[int, SafetensorsFile] = {}
        self._dequantiser = Dequantiser(plan.block)
        converted = (tensor.stored.num_bytes for tensor in tensors if self._is_converted(tensor))
        self._scratch = bytearray(max(converted, default=0))

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._opened.values():
            file.close()

    def load(self, tensor: BaseTensor) -> torch.Tensor:
        """One tensor in its final dtype, in memory of its own."""
        if not self._is_converted(tensor):
            return self._read(tensor, None)
        stored = self._read(tensor, self._scratch)
        scale = self._plan.scales.get(tensor.name)
        if scale is None:
            return stored.to(self._final_dtype(tensor))
        return self._dequantiser.dequantise(stored, self._read(scale, None), self._final_dtype(tensor))

    def _final_dtype(self, tensor: BaseTensor) -> torch.dtype:
        return torch.float32 if self._plan.expected[tensor.name].keep_float32 else self._dtype

    def _is_converted(self, tensor: BaseTensor) -> bool:
        return tensor.stored.dtype != self._final_dtype(tensor)

    def _read(self, tensor: BaseTensor, scratch: bytearray | None) -> torch.Tensor:
        if tensor.shard not in self._opened:
            self._opened[tensor.shard] = self._plan.files.open(tensor.shard)
        file = self._opened[tensor.shard]
        if file.by_name.get(tensor.stored.name) != tensor.stored:
            raise CheckpointError(f"{file.label}: changed while it was being loaded")
        return file.read(tensor.stored, scratch=scratch)


def plan_base(model_dir: Path, expected: Mapping[str, TensorSpec], *, ignored_layers_from: int) -> BasePlan:
    """Compare the headers in `model_dir` with `expected` (disk names) before any weight is read.

    Layers from `ignored_layers_from` on (multi-token prediction) are skipped and reported. Raises CheckpointError with
    every missing, unexpected, mis-shaped or unreadable tensor by name and the likely cause.
    """
    model_dir = Path(model_dir)
    config, block = check_quantisation(model_dir)
    files = find_base_files(model_dir)
    checked = check_base(files, expected, ignored_layers_from, block)
    problems = (*files.problems, *checked.problems)
    if problems:
        cause = checked.likely_cause(files, config)
        noun = "problem" if len(problems) == 1 else "problems"
        raise CheckpointError(f"{model_dir}: {len(problems)} {noun} with the weights{cause}", problems)

    used = [files_tensor for files_tensor in files.tensors if files_tensor.name in expected]
    used.sort(key=lambda tensor: (tensor.shard, tensor.stored.offset))
    by_name = {tensor.name: tensor for tensor in files.tensors}
    scales = {
        tensor.name: by_name[tensor.name + SCALE_SUFFIX]
        for tensor in used
        if tensor.stored.dtype is torch.float8_e4m3fn
    }
    num_bytes = sum(tensor.stored.num_bytes for tensor in (*used, *scales.values()))
    report = BaseReport(checked.skipped, num_bytes, len(files.shards), len(scales))
    return BasePlan(report, expected, files, tuple(used), scales, block)


def stream_base(
    model_dir: Path,
    expected: Mapping[str, TensorSpec],
    dtype: torch.dtype,
    *,
    ignored_layers_from: int,
    progress: Progress | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """`plan_base(...).stream(...)` in one call: all checks are done before this returns, CheckpointError otherwise."""
    return plan_base(model_dir, expected, ignored_layers_from=ignored_layers_from).stream(dtype, progress)
