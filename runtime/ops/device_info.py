"""What can be asked of a device, and the commands that tell about its driver: what `graft doctor` reports."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# Run with a timeout by whoever asks; absent commands are no fault.
DRIVER_COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "cpu": (),
    "cuda": (("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),),
    "npu": (("npu-smi", "-v"), ("npu-smi", "info")),
}
# Beside a device's name, the package that makes torch know it.
DEVICE_PACKAGES: dict[str, tuple[str, ...]] = {"cpu": (), "cuda": ("triton",), "npu": ("torch_npu",)}
# Below a home of the device's software (CANN), and beside it, the files that tell versions; patterns.
SOFTWARE_HOMES: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "cuda": (),
    "npu": ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann", "/usr/local/Ascend/latest"),
}
VERSION_FILES = ("version.info", "version.cfg", "*/ascend_toolkit_install.info", "*/version.info")
DRIVER_FILES: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("/proc/driver/nvidia/version",),
    "npu": ("/usr/local/Ascend/driver/version.info", "/usr/local/Ascend/firmware/version.info"),
}


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; errors of earlier calls come up here."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give what PyTorch holds but does not use back to the device."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """(free, all) bytes of the device; of the host, or of its control group where that has a lower limit."""
    if device.type != "cpu":
        free, total = getattr(torch, device.type).mem_get_info(device)
        return int(free), int(total)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _available_bytes(total)
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None and limit < total:
        return max(0, min(free, limit - used)), limit
    return free, total


def device_names(device: torch.device) -> list[str]:
    """The name of every visible device of this kind; a CPU is one, by its model."""
    if device.type == "cpu":
        return [cpu_model()]
    module = getattr(torch, device.type)
    return [str(module.get_device_name(index)) for index in range(module.device_count())]


def cpu_model() -> str:
    """The processor as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Hardware"))]
    return named[0] if named else os.uname().machine


def _available_bytes(default: int) -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return default
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else default


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
