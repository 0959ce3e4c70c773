"""What one step launches on an Ascend device, recorded from the server's own runner and model on meta tensors.

Of each kind of layer the model has two, the first and one like all others, so that what a step computes once and later
layers share is counted once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from runtime.adapters.lora_plan import BASE_SLOT
from runtime.engine.batch import Batch, Chunk
from runtime.engine.messages import RequestId
from runtime.engine.runner import Runner
from runtime.layers.placement import Placement
from runtime.models.deepseek.model import DeepseekModel
from runtime.models.deepseek.router import Router
from runtime.ops.npu.ops import NpuOps
from tests.npu import bench
from tests.npu.real_shapes import EP16, LORA_RANK, META, V2_LITE, V3, meta_adapter, meta_pages, real_config

BLOCK_TOKENS, CONTEXT_TOKENS = 128, 4096
UPLOAD = "copy from the host"


@dataclass(frozen=True)
class Model:
    """What one device computes: its layers, of sizes `changes`; `router` replaces the sizes that the router sees."""

    name: str
    changes: Mapping[str, Any]
    num_dense: int
    num_routed: int
    router: Mapping[str, Any] | None = None


MODELS = {
    "V3 EP16": Model("DeepSeek-V3, one device of EP16", EP16, 3, 58, router=V3),
    "V2-Lite": Model("DeepSeek-V2-Lite, one device", V2_LITE, 1, 26),
}


@dataclass(frozen=True)
class Case:
    """One step: `num_rows` sequences that decode or, if `prefill`, one chunk of so many tokens.

    Rows take turns with the adapters; each adapter has the first `coverage` of the device's experts in every layer.
    `mla_prolog`: whether MLA's projections may be one operator.
    """

    num_rows: int
    num_adapters: int
    coverage: float = 1.0
    prefill: bool = False
    mla_prolog: bool = True

    @property
    def label(self) -> str:
        """As in the tables."""
        kind = f"prefill {self.num_rows}" if self.prefill else f"decode {self.num_rows}"
        covered = "" if self.coverage == 1 else f" on {self.coverage:.0%}"
        return f"{kind}, {self.num_adapters} adapters{covered}" + ("" if self.mla_prolog else ", no MLA prolog")


@dataclass(frozen=True)
class Part:
    """The launches of one part of a step, which the whole step has `times` times."""

    name: str
    times: int
    launches: list[bench.Launch]


def record_step(model: Model, case: Case) -> list[Part]:
    """The parts of a step of the whole model: what stands outside the layers, then each kind of layer."""
    kinds = [kind for kind, count in (("dense", model.num_dense), ("routed", model.num_routed)) for _ in range(count)]
    shown = [index for index, kind in enumerate(kinds) if index - kinds.index(kind) < 2]
    runner = _runner(model, case, [kinds[index] for index in shown])
    edges: list[int] = []
    with bench.record(all_operators=True) as launches, _uploads(launches):
        for layer in runner.model.layers:
            layer.register_forward_pre_hook(lambda *_: edges.append(len(launches)))
            layer.register_forward_hook(lambda *_: edges.append(len(launches)))
        runner.run(_batch(case))
    num_pages = len(_experts(model, case)) * case.num_adapters
    launches = [_with_fewer_pages(launch, num_pages) for launch in launches]
    parts = [Part("outside the layers", 1, launches[: edges[0]] + launches[edges[-1] :])]
    for place, index in enumerate(shown):
        is_first = kinds.index(kinds[index]) == index
        name, times = (f"first {kinds[index]} layer", 1) if is_first else (f"{kinds[index]} layer", 0)
        times = times or kinds.count(kinds[index]) - 1
        parts.append(Part(name, times, launches[edges[2 * place] : edges[2 * place + 1]]))
    return parts


def _runner(model: Model, case: Case, kinds: list[str]) -> Runner:
    sizes = {"num_hidden_layers": len(kinds), "first_k_dense_replace": kinds.count("dense")}
    config = real_config({**model.changes, **sizes})
    placement = Placement(META, torch.bfloat16, NpuOps(mla_prolog=case.mla_prolog))
    decoder = DeepseekModel(config, placement)
    for layer in decoder.layers:
        layer.self_attn.absorb_weights()
    if model.router is not None:
        _replace_routers(decoder, Router(real_config(model.router), placement))
    pages = meta_pages(config, meta_adapter(config, _experts(model, case)), case.num_adapters)
    return Runner(decoder, pages, _num_blocks(case), BLOCK_TOKENS)


def _experts(model: Model, case: Case) -> range:
    return range(max(1, round(model.changes["n_routed_experts"] * case.coverage)))


def _replace_routers(decoder: nn.Module, router: Router) -> None:
    for module in decoder.modules():
        if isinstance(getattr(module, "gate", None), Router):
            module.gate = router


def _num_blocks(case: Case) -> int:
    return (1 if case.prefill else case.num_rows) * (CONTEXT_TOKENS // BLOCK_TOKENS)


def _batch(case: Case) -> Batch:
    """Decodes at the last of 4,096 tokens, ordered by adapter; or the first chunk of a prompt."""
    blocks = list(range(CONTEXT_TOKENS // BLOCK_TOKENS))
    if case.prefill:
        slot = 0 if case.num_adapters else BASE_SLOT
        return Batch([Chunk(RequestId(0), [1] * case.num_rows, 0, blocks, slot, samples=True)])
    slots = sorted(row % case.num_adapters if case.num_adapters else BASE_SLOT for row in range(case.num_rows))
    chunks = [
        Chunk(RequestId(row), [1], CONTEXT_TOKENS - 1, [row * len(blocks) + block for block in blocks], slot, True)
        for row, slot in enumerate(slots)
    ]
    return Batch(chunks)


def _uploads(launches: list[bench.Launch]) -> Any:
    """Enter each tensor that is made of Python numbers: on a device it is a copy from the host."""
    make = torch.tensor

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        launches.append(bench.Launch(UPLOAD, (), 0, made.numel() * made.element_size(), 0))
        return made

    return patch.object(torch, "tensor", counted)


def is_lora(launch: bench.Launch) -> bool:
    """Whether this is a grouped product with LoRA factors, by the rank among its weight's sides."""
    ranks = {LORA_RANK, 2 * LORA_RANK}
    return launch.operator == "npu_grouped_matmul" and bool(ranks & set(launch.inputs[1][0][1:]))


def _with_fewer_pages(launch: bench.Launch, num_resident_pages: int) -> bench.Launch:
    """Rows spread over all resident pages, of which a launch has 1,024: the bench knows only these."""
    if not is_lora(launch):
        return launch
    (num_rows, _), (num_pages, inner, columns) = launch.inputs[0][0], launch.inputs[1][0]
    counted, spread = min(num_rows, num_pages), min(num_rows, num_resident_pages) * num_pages // num_resident_pages
    return replace(launch, bytes_read=launch.bytes_read - 2 * (counted - spread) * inner * columns)


def kind_of(launch: bench.Launch) -> str:
    """The operator's name, with LoRA's products apart from the base's."""
    return f"{launch.operator} (LoRA)" if is_lora(launch) else launch.operator
