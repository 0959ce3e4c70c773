"""Device memory of adapters beside the bytes of their own tensors, and beside what slots of one size would take.

    python -m benchmarks.device_bytes [--tiny] [--results DIR]

Adapters on the routed experts of the bench model (of which only the configuration is needed), in bfloat16: all experts
or 10 % of them, of one rank from 8 to 64, and with ranks from 8 to 64 mixed within one adapter. They are loaded by the
adapter store as a server does. Then: how many of 10 % fit where a few full ones fit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import machine
from benchmarks.make_model import FULL, TINY
from runtime.adapters.info import AdapterInfo
from runtime.adapters.store import AdapterStore, StoreLimits
from runtime.engine.messages import CallId, LoadAdapter
from runtime.errors import GraftError
from runtime.models.deepseek.config import DeepseekConfig

ASKED_RATIO, ASKED_TIMES = 1.05, 8.0
RANKS = (8, 16, 32, 64)
SMALL_SHARE = 0.1
NUM_FULL = 3
FIT_RANK = 16
WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """What one adapter has: its ranks are given to its experts in turn."""

    name: str
    ranks: tuple[int, ...]
    share: float


CASES = tuple(
    Case(f"{'all' if share == 1 else f'{share:.0%}'} of the experts, rank {name}", ranks, share)
    for share in (1.0, SMALL_SHARE)
    for name, ranks in [*((str(rank), (rank,)) for rank in RANKS), ("8 to 64 mixed", RANKS)]
)


class Device:
    """An adapter store of a base, without an engine."""

    def __init__(self, base: Path, *, max_adapters: int = 64, max_bytes: int = 2**40) -> None:
        targets = DeepseekConfig.from_dir(base).adapter_targets()
        self._woken = threading.Event()
        limits = StoreLimits(max_adapters, max(RANKS), max_bytes)
        self.store = AdapterStore(targets, limits, torch.device("cpu"), torch.bfloat16, self._woken.set)

    def load(self, name: str, folder: Path) -> AdapterInfo:
        """Load an adapter; it is on the device if there is room, and takes nobody's place."""
        replies: list[AdapterInfo | GraftError] = []
        self.store.load(LoadAdapter(CallId(0), name, str(folder)), replies.append)
        while not replies:
            if not self.store.has_work and not self._woken.wait(WAIT_SECONDS):
                raise TimeoutError(f"adapter {name} was not loaded")
            self._woken.clear()
            self.store.advance(whole=True)
        if isinstance(replies[0], GraftError):
            raise replies[0]
        return self.store.info(name)


def write_base(folder: Path, config: dict[str, Any]) -> Path:
    """The configuration alone: adapters are checked against it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_adapter(folder: Path, config: dict[str, Any], case: Case) -> Path:
    """PEFT's per-expert file of a case."""
    folder.mkdir()
    layers = range(config["first_k_dense_replace"], config["num_hidden_layers"])
    places = list(itertools.product(layers, range(config["n_routed_experts"])))
    num_chosen = max(1, round(case.share * len(places)))
    chosen = [places[index * len(places) // num_chosen] for index in range(num_chosen)]
    tensors: dict[str, torch.Tensor] = {}
    for (layer, expert), rank in zip(chosen, itertools.cycle(case.ranks), strict=False):
        prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}"
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        for module, num_out, num_in in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            tensors[f"{prefix}.{module}_proj.lora_A.weight"] = torch.ones(rank, num_in, dtype=torch.bfloat16)
            tensors[f"{prefix}.{module}_proj.lora_B.weight"] = torch.ones(num_out, rank, dtype=torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": max(case.ranks), "lora_alpha": 1, "target_modules": ["gate_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def measure_cases(work: Path, config: dict[str, Any], cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """Each case on a device of its own, and all of them on one."""
    base = write_base(work / "base", config)
    together = Device(base)
    rows, all_tensor_bytes = [], 0
    for number, case in enumerate(cases):
        folder = write_adapter(work / f"case-{number}", config, case)
        alone = Device(base)
        info = alone.load("adapter", folder)
        all_tensor_bytes += info.tensor_bytes
        rows.append(_row(case.name, alone.store.pages.num_bytes, info.tensor_bytes, _dense(config, 1)))
        together.load(f"adapter-{number}", folder)
        alone.store.close()
    device_bytes = together.store.pages.num_bytes
    rows.append(_row("all of these together", device_bytes, all_tensor_bytes, _dense(config, len(cases))))
    together.store.close()
    return rows


def measure_fit(work: Path, config: dict[str, Any], num_full: int = NUM_FULL) -> dict[str, Any]:
    """How many adapters of 10 % are on the device where `num_full` of all experts fill it."""
    base = write_base(work / "base", config)
    full = write_adapter(work / "full", config, Case("full", (FIT_RANK,), 1.0))
    small = write_adapter(work / "small", config, Case("small", (FIT_RANK,), SMALL_SHARE))
    probe = Device(base)
    budget = num_full * probe.load("full", full).device_bytes
    probe.store.close()
    num_fit = {}
    for name, folder in (("full", full), ("small", small)):
        device = Device(base, max_adapters=100 * num_full, max_bytes=budget)
        count = 0
        while device.load(f"{name}-{count}", folder).slot >= 0:
            count += 1
        num_fit[name] = device.store.num_resident
        device.store.close()
    times = num_fit["small"] / num_fit["full"]
    return {"budget_bytes": budget, **num_fit, "times": times, "dense_bytes": _dense(config, num_fit["small"])}


def _dense(config: dict[str, Any], num_slots: int) -> int:
    """Bytes of slots x experts x the largest rank."""
    num_layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    per_rank = 3 * (config["hidden_size"] + config["moe_intermediate_size"])
    per_expert = max(RANKS) * per_rank * torch.bfloat16.itemsize
    return num_slots * num_layers * int(config["n_routed_experts"]) * per_expert


def _row(name: str, device_bytes: int, tensor_bytes: int, dense_bytes: int) -> dict[str, Any]:
    return {
        "name": name,
        "device_bytes": device_bytes,
        "tensor_bytes": tensor_bytes,
        "ratio": device_bytes / tensor_bytes,
        "dense_bytes": dense_bytes,
    }


def as_text(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    lines = [
        f"adapters on routed experts, bfloat16; model: {report['model']}",
        "",
        f"  {'MB':<36} {'device':>9} {'tensors':>9} {'ratio':>7}   asked <= {ASKED_RATIO}   dense slots of rank "
        f"{max(RANKS)}",
    ]
    lines += [
        f"  {row['name']:<36} {row['device_bytes'] / 1e6:>9.2f} {row['tensor_bytes'] / 1e6:>9.2f} {row['ratio']:>7.4f}"
        f"{row['dense_bytes'] / 1e6:>33.1f}"
        for row in report["cases"]
    ]
    fit = report["fit"]
    lines += [
        "",
        f"  in {fit['budget_bytes'] / 1e6:.1f} MB: {fit['full']} adapters of rank {FIT_RANK} on all experts, or "
        f"{fit['small']} on {SMALL_SHARE:.0%} of them: {fit['times']:.1f}x   asked >= {ASKED_TIMES}x",
        f"  dense slots of rank {max(RANKS)} for {fit['small']} adapters would take {fit['dense_bytes'] / 1e6:.1f} MB",
    ]
    return "\n".join([*lines, "", *(f"  {name}: {value}" for name, value in report["machine"].items())])


def main() -> None:
    """Command line: see the module's text."""
    arguments = _parse()
    config = TINY if arguments.tiny else FULL
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        report: dict[str, Any] = {
            "cases": measure_cases(Path(first), config),
            "fit": measure_fit(Path(second), config),
            "model": "tiny" if arguments.tiny else "the bench model's shape",
            "machine": machine.describe(),
        }
    text = as_text(report)
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = arguments.results / ("device_bytes_tiny" if arguments.tiny else "device_bytes")
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
