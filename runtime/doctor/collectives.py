"""An all-reduce over this host's visible devices, a process each: `python -m runtime.doctor.collectives DEVICE`."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from runtime.distributed.mesh import start_processes, stop_processes
from runtime.doctor.finding import Finding
from runtime.doctor.run import FAILED, MAX_ERROR_TEXT, PASSED, SKIPPED
from runtime.env import child_environment, process_rank, processes_environment
from runtime.ops.device_info import synchronise
from runtime.ops.platform import bind_process, open_device

COLLECTIVES = "all-reduce"
MAX_PROCESSES = 8
NUM_NUMBERS, NUM_CALLS = 2**24, 5
LIMIT_SECONDS = 120.0
MARK = "graft-doctor-collective "


def check_collectives(device: str, num_processes: int) -> Finding:
    """Start the processes and take the first one's word; one process has nobody to speak with."""
    if num_processes < 2:
        return Finding(COLLECTIVES, SKIPPED, note="one device is visible; it takes two or more")
    num_processes = min(num_processes, MAX_PROCESSES)
    command = [sys.executable, "-m", "runtime.doctor.collectives", device]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for environment in processes_environment(child_environment(), num_processes)
    ]
    end = time.monotonic() + LIMIT_SECONDS
    try:
        said = [process.communicate(timeout=max(0.1, end - time.monotonic()))[0] for process in processes]
    except subprocess.TimeoutExpired:
        return Finding(COLLECTIVES, FAILED, note=f"{num_processes} processes did not end within {LIMIT_SECONDS:.0f} s")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = [line.removeprefix(MARK) for line in said[0].splitlines() if line.startswith(MARK)]
    if any(process.returncode for process in processes) or not told:
        rank = next((rank for rank, process in enumerate(processes) if process.returncode), 0)
        lines = " ".join(said[rank].split())[-MAX_ERROR_TEXT:]
        status = processes[rank].returncode
        return Finding(COLLECTIVES, FAILED, note=f"process {rank} ended with status {status}: {lines}")
    facts = json.loads(told[0])
    return Finding(COLLECTIVES, PASSED if facts["is_right"] else FAILED, facts)


def _main(device_name: str) -> None:
    """This process's part: ones times its rank + 1, summed, against n (n + 1) / 2."""
    rank, num_processes, local_rank = process_rank()
    device = bind_process(open_device(device_name), local_rank)
    start_processes(device, rank, num_processes, LIMIT_SECONDS)
    x = torch.full((NUM_NUMBERS,), float(rank + 1), dtype=torch.bfloat16, device=device)
    dist.all_reduce(x)
    is_right = bool((x == num_processes * (num_processes + 1) / 2).all())
    synchronise(device)
    start = time.perf_counter()
    for _ in range(NUM_CALLS):
        dist.all_reduce(x)
    synchronise(device)
    seconds = (time.perf_counter() - start) / NUM_CALLS
    moved = 2 * (num_processes - 1) / num_processes * x.numel() * x.element_size()
    if rank == 0:
        facts = {
            "processes": num_processes,
            "bytes": x.numel() * x.element_size(),
            "is_right": is_right,
            "ms": round(seconds * 1e3, 3),
            "bus_gigabytes_per_second": round(moved / seconds / 1e9, 2),
        }
        sys.stdout.write(MARK + json.dumps(facts) + "\n")
    stop_processes()


if __name__ == "__main__":
    _main(sys.argv[1])
