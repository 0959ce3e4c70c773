"""What an adapter that is only on disk adds to the time to first token, beside reading and copying its file.

    python -m benchmarks.cold_adapter [--tiny] [--repeats N] [--models DIR] [--results DIR]

A real server that is otherwise idle, the bench model, an adapter of 66 MB that is registered (`lazy`). Timed at the
client: a request that has to bring it, then the same request again, with the adapter on the device. Asked: the
difference is at most 1.5 times what the file's bytes take at the bandwidth measured beside it, and one step.

The bandwidth is that of a plain program, one thread: `open(file, "rb", buffering=0).read()` of the whole file into a
new buffer, then one copy of these bytes into another new buffer. Both are measured twice over: "disk" drops the file's
pages from the system's cache before each request and each plain reading (posix_fadvise), "cached" leaves them there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from benchmarks import machine
from benchmarks.make_model import DEFAULT_OUT, adapter_dir
from benchmarks.served import Served, models_dir, serving, stream_request
from runtime.pb.fmaas.generation_pb2_grpc import GenerationServiceStub

ASKED_FACTOR = 1.5
NUM_TOKENS = 8
PROMPT = "the quick brown fox jumps over"
NAME = "cold"
STATES = ("disk", "cached")


@dataclass(frozen=True)
class Sample:
    """Seconds of one repeat; `load_seconds` is what the server says that reading took."""

    state: str
    cold_seconds: float
    resident_seconds: float
    step_seconds: float
    load_seconds: float
    read_seconds: float
    copy_seconds: float


def main() -> None:
    """Command line: see the module's text."""
    arguments = _parse()
    models = models_dir(arguments.models, tiny=arguments.tiny)
    folder = adapter_dir(models, 0, "per-expert")
    with serving(models) as served, channel_of(served) as stub:
        sample(served, stub, folder, "cached")  # everything has run once
        samples = [sample(served, stub, folder, state) for _ in range(arguments.repeats) for state in STATES]
    report = summarise(samples, _weights(folder).stat().st_size)
    report |= {"model": "tiny" if arguments.tiny else "0.79 B, bfloat16", "machine": machine.describe()}
    text = as_text(report)
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = arguments.results / ("cold_adapter_tiny" if arguments.tiny else "cold_adapter")
    raw = report | {"samples": [asdict(each) for each in samples]}
    stem.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


@contextmanager
def channel_of(served: Served) -> Iterator[Any]:
    """The stub of the server's generation service."""
    with grpc.insecure_channel(served.address) as channel:
        yield GenerationServiceStub(channel)


def sample(served: Served, stub: Any, folder: Path, state: str) -> Sample:
    """One repeat: cold, resident, and the plain program."""
    served.load(NAME, folder, lazy=True)
    _prepare(folder, state)
    cold_seconds, _ = _request(stub)
    load_seconds = served.get(NAME).load_time.ToNanoseconds() / 1e9
    resident_seconds, step_seconds = _request(stub)
    served.unload(NAME)
    _prepare(folder, state)
    return Sample(state, cold_seconds, resident_seconds, step_seconds, load_seconds, *_read_and_copy(_weights(folder)))


def _request(stub: Any) -> tuple[float, float]:
    """Seconds to the first token, and the median of those between later ones."""
    begun = time.monotonic()
    moments = [
        time.monotonic()
        for response in stub.GenerateStream(stream_request(NAME, PROMPT, NUM_TOKENS), timeout=120)
        if response.generated_token_count
    ]
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    return moments[0] - begun, statistics.median(gaps)


def _prepare(folder: Path, state: str) -> None:
    """Take the file's pages from the cache, or put them there."""
    with _weights(folder).open("rb", buffering=0) as file:
        if state == "disk":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            file.read()


def _read_and_copy(file: Path) -> tuple[float, float]:
    begun = time.monotonic()
    with file.open("rb", buffering=0) as stream:
        content = stream.read()
    middle = time.monotonic()
    copied = bytearray(content)
    ended = time.monotonic()
    if len(copied) != file.stat().st_size:
        raise RuntimeError(f"{file} was not read whole")
    return middle - begun, ended - middle


def _weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def summarise(samples: list[Sample], num_bytes: int) -> dict[str, Any]:
    """Medians of each state, the extra time, and its bound."""
    report: dict[str, Any] = {"file_bytes": num_bytes}
    for state in STATES:
        own = [each for each in samples if each.state == state]
        names = ("cold", "resident", "step", "load", "read", "copy")
        medians = {name: statistics.median(getattr(each, f"{name}_seconds") for each in own) for name in names}
        extra = statistics.median(each.cold_seconds - each.resident_seconds for each in own)
        plain = statistics.median(each.read_seconds + each.copy_seconds for each in own)
        bound = ASKED_FACTOR * plain + medians["step"]
        report[state] = {
            **{f"{name}_ms": 1e3 * value for name, value in medians.items()},
            "repeats": len(own),
            "extra_ms": 1e3 * extra,
            "plain_ms": 1e3 * plain,
            "bandwidth_bytes_per_second": num_bytes / plain,
            "bound_ms": 1e3 * bound,
            "is_met": extra <= bound,
            "factor": (extra - medians["step"]) / plain,
        }
    return report


def as_text(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    lines = [f"an adapter of {report['file_bytes'] / 1e6:.1f} MB, otherwise idle server; model: {report['model']}", ""]
    for state in STATES:
        own = report[state]
        lines += [
            f"  file on {state}:" if state == "disk" else "  file in the system's cache:",
            f"    first token, adapter on disk {own['cold_ms']:.1f} ms, on the device {own['resident_ms']:.1f} ms",
            f"    extra {own['extra_ms']:.1f} ms   asked <= {own['bound_ms']:.1f} ms = {ASKED_FACTOR} x "
            f"{own['plain_ms']:.1f} ms + one step of {own['step_ms']:.1f} ms"
            f"   {'met' if own['is_met'] else 'NOT MET'}, factor {own['factor']:.2f}",
            f"    plain program: read {own['read_ms']:.1f} ms + copy {own['copy_ms']:.1f} ms, "
            f"{own['bandwidth_bytes_per_second'] / 1e9:.2f} GB/s; the server's reading took {own['load_ms']:.1f} ms",
            "",
        ]
    lines.append(f"  medians of {report['disk']['repeats']} repeats")
    return "\n".join([*lines, "", *(f"  {name}: {value}" for name, value in report["machine"].items())])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--tiny", action="store_true", help="a small float32 model, to try the script")
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
