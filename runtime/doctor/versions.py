"""What runs here: versions of Graft and of the device's software, devices, memory, environment."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from runtime.doctor.run import text_of
from runtime.env import cann_homes, device_environment
from runtime.ops import device_info
from runtime.version import version

COMMAND_SECONDS = 15.0
ABSENT = "absent"
PACKAGES = ("numpy", "safetensors", "transformers", "tokenizers")
_VERSION_WORDS = ("version", "inner", "timestamp", "install", "path", "arch")
_MAX_LINES, _MAX_BYTES = 12, 4096


def gather(device: torch.device) -> dict[str, str]:
    """Label -> value, in the order of the report. What is absent is said to be; nothing here fails."""
    kind = device.type
    facts = {
        "graft": version(),
        "python": f"{platform.python_version()} ({platform.platform()})",
        "torch": f"{torch.__version__} ({torch.get_num_threads()} threads)",
    }
    facts |= {name: _package(name) for name in (*device_info.DEVICE_PACKAGES[kind], *PACKAGES)}
    facts |= {
        "devices": _asked(lambda: _devices(device)),
        "device memory": _asked(lambda: _memory(device)),
        "cpu": f"{device_info.cpu_model()}, {os.cpu_count()} cores",
        "host memory": _memory(torch.device("cpu")),
    }
    facts |= dict(software(kind))
    facts |= {" ".join(command): command_output(command) for command in device_info.DRIVER_COMMANDS[kind]}
    return facts


def environment() -> dict[str, str]:
    """The variables that steer devices, by name."""
    return device_environment()


def software(kind: str) -> Iterator[tuple[str, str]]:
    """Path and contents of the version files of a kind of device's software and driver."""
    homes = [Path(home) for home in (*(cann_homes() if device_info.SOFTWARE_HOMES[kind] else ()),
                                     *device_info.SOFTWARE_HOMES[kind])]  # fmt: skip
    found = [path for home in homes for pattern in device_info.VERSION_FILES for path in sorted(home.glob(pattern))]
    for path in dict.fromkeys(path.resolve() for path in found):
        yield str(path), _version_lines(path)
    if homes and not found:
        yield "CANN", f"no version file below {', '.join(map(str, homes))}"
    for name in device_info.DRIVER_FILES[kind]:
        yield name, _version_lines(Path(name)) if Path(name).is_file() else ABSENT


def _version_lines(path: Path) -> str:
    """The lines of a small file that tell of versions, joined."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file.read(_MAX_BYTES).splitlines()]
    except OSError as error:
        return f"cannot be read: {error}"
    told = [line for line in lines if any(word in line.lower() for word in _VERSION_WORDS)]
    return "; ".join(told[:_MAX_LINES]) or "empty"


def _package(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ABSENT


def command_output(command: tuple[str, ...]) -> str:
    """What a command says, `absent` where there is none; it never hangs and never fails this program."""
    try:
        done = subprocess.run(
            command, capture_output=True, check=False, timeout=COMMAND_SECONDS, text=True, errors="replace",
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        return ABSENT
    except subprocess.TimeoutExpired:
        return f"no answer within {COMMAND_SECONDS:.0f} s"
    except OSError as error:
        return f"cannot be run: {error}"
    said = (done.stdout or done.stderr).strip() or "nothing"
    return said if done.returncode == 0 else f"exit status {done.returncode}: {said}"


def _asked(question: Callable[[], str]) -> str:
    """A driver's answer, or what it raised."""
    try:
        return question()
    except Exception as problem:  # noqa: BLE001 - a broken driver is what the report is for
        return f"not told: {text_of(problem)}"


def _devices(device: torch.device) -> str:
    names = device_info.device_names(device)
    return f"{len(names)} x {names[0]}" if len(set(names)) == 1 else "; ".join(names) or "none"


def _memory(device: torch.device) -> str:
    free, total = device_info.memory_bytes(device)
    return f"{_gib(total)}, {_gib(free)} free"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
