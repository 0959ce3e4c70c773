"""Random factors as the trainer holds them (gate and up share A), and the weight changes that they mean."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.adapter_types import AdapterTargets, ExpertLora, LoraPair

RankAndScale = Callable[[str], tuple[int, float]]


def always(module: str) -> tuple[int, float]:
    """Rank 4 and scale 2 for every module."""
    return 4, 2.0


def differing(module: str) -> tuple[int, float]:
    """Ranks 2, 3 and 4, and scales whose ratios are powers of two."""
    number = zlib.crc32(module.encode())
    return 2 + number % 3, (0.5, 1.0, 4.0)[number // 3 % 3]


@dataclass
class Factors:
    """What `write_adapter` takes."""

    linears: dict[str, LoraPair]
    experts: dict[int, dict[int, ExpertLora]]

    def deltas(self) -> dict[str, Tensor]:
        """Module name on disk -> scale * b @ a, taken in float64, as float32."""
        pairs = dict(self.linears)
        for layer, adapted in self.experts.items():
            for expert, lora in adapted.items():
                for kind in ("gate", "up", "down"):
                    pair = getattr(lora, kind)
                    if pair is not None:
                        pairs[f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj"] = pair
        return {name: (pair.scale * pair.b.double() @ pair.a.double()).float() for name, pair in pairs.items()}


def draw(
    targets: AdapterTargets,
    *,
    linears: Iterable[str] | None = None,
    covers: Callable[[int, int], bool] = lambda layer, expert: True,
    rank_and_scale: RankAndScale = always,
    shared_a: bool = True,
) -> Factors:
    """Factors for `linears` (all by default) and the experts that `covers(layer, expert)` names, none of them zero."""
    names = targets.linears if linears is None else linears
    factors = Factors({name: _pair(name, *targets.linears[name], rank_and_scale) for name in names}, {})
    for layer, shape in targets.experts.items():
        for expert in range(shape.num_experts):
            if not covers(layer, expert):
                continue
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            gate = _pair(f"{name}.gate_proj", shape.intermediate, shape.hidden, rank_and_scale)
            up = _pair(f"{name}.up_proj", shape.intermediate, shape.hidden, rank_and_scale)
            if shared_a:
                same_rank = (gate.lora_rank, up.scale)
                up = _pair(f"{name}.up_proj", shape.intermediate, shape.hidden, lambda module, same=same_rank: same)
                up = LoraPair(gate.a, up.b, up.scale)
            down = _pair(f"{name}.down_proj", shape.hidden, shape.intermediate, rank_and_scale)
            factors.experts.setdefault(layer, {})[expert] = ExpertLora(gate, up, down)
    return factors


def _pair(name: str, num_out: int, num_in: int, rank_and_scale: RankAndScale) -> LoraPair:
    lora_rank, scale = rank_and_scale(name)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    a = torch.randn(lora_rank, num_in, generator=generator) * num_in**-0.5
    b = torch.randn(num_out, lora_rank, generator=generator) * 0.3 * lora_rank**-0.5 / scale
    return LoraPair(a, b, scale)
