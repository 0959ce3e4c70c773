"""Where the CPU back-end changes its way of multiplying: milliseconds of each way by rows per group.

    python -m benchmarks.grouped_products [--threads N]

The shapes are those of one layer of the 0.79 B model: 64 experts, and 512 LoRA pages of rank 16, in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from runtime.ops import cpu

HIDDEN, WIDTH, LORA_RANK = 1024, 512, 16
NUM_EXPERTS, NUM_PAGES = 64, 512
RESULT = Path(__file__).parent / "results" / "grouped_products.txt"


def main() -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        lines = [str(machine.describe()), "", *_base_lines(), "", *_lora_lines()]
    print(*lines, sep="\n")
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _base_lines() -> list[str]:
    ops = cpu.CpuOps()
    columns = ops.panel_columns(2 * WIDTH, num_parts=2)
    weight = torch.randn(NUM_EXPERTS, 2 * WIDTH // columns, HIDDEN, columns, dtype=torch.bfloat16)
    lines = ["base experts: rows per expert, bag ms, matmul loop ms"]
    for rows in (1, 2, 3, 4, 8):
        counts = torch.full((NUM_EXPERTS,), rows)
        x = torch.randn(rows * NUM_EXPERTS, HIDDEN).to(torch.bfloat16)
        bag = _ms(lambda x=x, counts=counts: cpu._panel_bag_matmul(x, weight, counts))
        loop = _ms(lambda x=x, counts=counts: cpu._loop_matmul(x, weight, counts.tolist()))
        lines.append(f"{rows:4d} {bag:8.1f} {loop:8.1f}")
    return lines


def _lora_lines() -> list[str]:
    a = torch.randn(NUM_PAGES, HIDDEN, 2 * LORA_RANK, dtype=torch.bfloat16)
    bs = [torch.randn(NUM_PAGES, LORA_RANK, WIDTH, dtype=torch.bfloat16) for _ in range(2)]
    pages = torch.arange(NUM_PAGES)
    lines = ["LoRA gate and up: rows per page, bag ms, tiles ms"]
    for rows in (1, 2, 4, 6, 8, 16):
        x = torch.randn(rows * NUM_PAGES, HIDDEN).to(torch.bfloat16)
        y = torch.zeros(rows * NUM_PAGES, 2 * WIDTH, dtype=torch.bfloat16)
        each, counts, index = pages.repeat_interleave(rows), torch.full((NUM_PAGES,), rows), torch.arange(len(x))
        bag = _ms(lambda x=x, y=y, each=each, index=index: cpu._bag_lora_add_(y, x, a, bs, index, each))
        tiles = _ms(lambda x=x, y=y, c=counts, index=index: cpu._tile_lora_add_(y, x, a, bs, index, pages, c))
        lines.append(f"{rows:4d} {bag:8.1f} {tiles:8.1f}")
    return lines


def _ms(run: Callable[[], Tensor | None], repeats: int = 5) -> float:
    """The fastest of a few runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


if __name__ == "__main__":
    main()
