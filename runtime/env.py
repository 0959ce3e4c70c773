"""The only place that reads the environment."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys


def configure_logging() -> None:
    """Log to stderr at the level of GRAFT_LOG_LEVEL (default INFO)."""
    level = os.environ.get("GRAFT_LOG_LEVEL", "INFO").upper()
    logging.basicConfig(
        stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"
    )


def default_server() -> str:
    """Where `graft generate` sends requests: GRAFT_SERVER, or the default port on this host."""
    return os.environ.get("GRAFT_SERVER", "127.0.0.1:8033")


def default_admin() -> str:
    """Where `graft adapters` sends calls: GRAFT_ADMIN, or the default admin port on this host."""
    return os.environ.get("GRAFT_ADMIN", "127.0.0.1:8034")


def reading_niceness(default: int | None) -> int | None:
    """How far the process that reads adapters stands back for others: GRAFT_READING_NICENESS, 0 to 19 or `idle`.

    None is `idle`: it has what no other process wants. Raises ValueError for anything else.
    """
    text = os.environ.get("GRAFT_READING_NICENESS")
    if text is None:
        return default
    if text == "idle":
        return None
    if not (text.isdecimal() and int(text) <= 19):
        raise ValueError(
            f"the environment variable GRAFT_READING_NICENESS = {text!r} is not a number from 0 to 19, nor idle"
        )
    return int(text)


def child_environment() -> dict[str, str]:
    """The environment of a Python child that sees the same modules as this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def engine_environment() -> dict[str, str]:
    """The environment of an engine's process.

    On CPU a step's threads spin while one of them runs Python, by libgomp's default for much of the pause that steps
    make for the reading of adapters; here for about a millisecond, unless this process's environment has a say in it.
    """
    environment = child_environment()
    if not _SPINNING & environment.keys():
        environment["GOMP_SPINCOUNT"] = "60000"
    return environment


def places_openmp_threads() -> bool:
    """Whether the environment says on which cores OpenMP's threads run."""
    return bool(_PLACING & os.environ.keys())


def allows_mla_prolog() -> bool:
    """Whether an Ascend device may run MLA's projections as one operator: yes, unless GRAFT_NPU_MLA_PROLOG is 0.

    Raises ValueError for anything but 0 and 1.
    """
    value = os.environ.get("GRAFT_NPU_MLA_PROLOG", "1")
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable GRAFT_NPU_MLA_PROLOG = {value!r}: use 0 or 1, or leave it out")
    return value == "1"


def process_rank() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this host) as torchrun sets them; a process alone is (0, 1, 0).

    Raises ValueError naming the variable that holds no such number.
    """
    rank, world_size, local_rank = (_number(name, default) for name, default in _TORCHRUN)
    if not (world_size >= 1 and 0 <= rank < world_size and local_rank >= 0):
        raise ValueError(f"RANK = {rank}, WORLD_SIZE = {world_size}, LOCAL_RANK = {local_rank}: RANK counts from 0 to "
                         "WORLD_SIZE - 1; torchrun sets all three")  # fmt: skip
    return rank, world_size, local_rank


def num_local_processes(local_rank: int) -> int:
    """Processes of the run on this host: as torchrun says, else all that a process of this local rank knows of."""
    return max(_number("LOCAL_WORLD_SIZE", "1"), local_rank + 1)


def _number(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} = {text!r} is no number: torchrun sets it, or leave it out")
    return int(text)


_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def is_started_by_torchrun() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def processes_environment(environment: dict[str, str], num_processes: int) -> list[dict[str, str]]:
    """Environments of processes that meet on this host, with this host's cores shared among them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    shared = {"OMP_NUM_THREADS": str(threads)} | environment
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes),
               "LOCAL_WORLD_SIZE": str(num_processes)}  # fmt: skip
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def device_environment() -> dict[str, str]:
    """The variables that steer devices, collectives and threads; of one that may hold a secret only that it is set."""
    return {
        name: "(set, not shown)" if _MAY_BE_SECRET.search(name) or _CREDENTIALS_IN_URL.search(value) else value
        for name, value in sorted(os.environ.items())
        if name.startswith(_DEVICE_PREFIXES) or name in _DEVICE_VARIABLES
    }


def cann_homes() -> list[str]:
    """Where this shell says that CANN is installed, as its set_env.sh does."""
    return [os.environ[name] for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH") if os.environ.get(name)]


_PLACING = {"GOMP_CPU_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND"}
_SPINNING = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
_DEVICE_PREFIXES = ("ASCEND_", "ATB_", "CUDA_", "GLOO_", "GOMP_", "GRAFT_", "HCCL_", "KMP_", "MKL_", "NCCL_", "NPU_",
                    "NVIDIA_", "OMP_", "PYTORCH_", "TORCH_")  # fmt: skip
_DEVICE_VARIABLES = ("ACL_OP_INIT_MODE", "CPU_AFFINITY_CONF", "INF_NAN_MODE_ENABLE", "LD_LIBRARY_PATH", "LD_PRELOAD",
                     "LOCAL_RANK", "MULTI_STREAM_MEMORY_REUSE", "RANK", "STREAMS_PER_DEVICE", "TASK_QUEUE_ENABLE",
                     "TP_SOCKET_IFNAME", "WORLD_SIZE")  # fmt: skip
_MAY_BE_SECRET = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|APIKEY|_KEY|AUTH", re.IGNORECASE)
_CREDENTIALS_IN_URL = re.compile(r"://[^/\s]*@")
