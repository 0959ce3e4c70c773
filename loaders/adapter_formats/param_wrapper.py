"""Layout 2: PEFT >= 0.19 on stacked experts (`target_parameters`), all experts of a layer in one pair.

Keys: `...mlp.experts.lora_A.weight` and, when both stacks are adapted, `...mlp.experts.base_layer.lora_A.weight` for
the inner wrapper. A is expert-major in rows, B rank-major in columns (peft.tuners.lora.layer.ParamWrapper):

    A.reshape(E, R, in)          B.reshape(out, R, E).permute(2, 0, 1) -> [E, out, R]

E experts, R rank of the stack, H hidden, I intermediate. gate_up: in H, out 2I (gate rows, then up rows); down: in I,
out H. PEFT's conversion of old files joins gate and up at rank 2r with a block-diagonal B; that is split again.
"""

import re
from collections import defaultdict
from collections.abc import MutableMapping
from typing import Literal

import torch
from torch import Tensor

from loaders.adapter_formats.base import AdapterBuilder, FormatContext, Projection, take
from loaders.adapter_keys import FactorPair, explain_hidden
from loaders.adapter_types import ExpertShape, LoraPair

Stack = Literal["gate_up_proj", "down_proj"]
_SWAPPED_VERSIONS = re.compile(r"0\.(\d|1[0-8])(\.|$)")
_MODULE = re.compile(r"^model\.layers\.(0|[1-9][0-9]*)\.mlp\.experts(?:\.base_layer)*$")


class ParamWrapperFormat:
    """PEFT ParamWrapper factors of stacked experts."""

    layout = "PEFT ParamWrapper stacks (target_parameters)"

    def recognises(self, module: str) -> bool:
        """`...mlp.experts` and `...mlp.experts.base_layer`."""
        return _MODULE.match(module) is not None

    def check(self, pairs: list[FactorPair], context: FormatContext) -> None:
        """Each stack must fit gate_up or down of its layer, and each of these may occur once."""
        self._check_origin(context)
        seen: dict[tuple[int, Stack], list[str]] = defaultdict(list)
        for pair in pairs:
            layer = self._layer(pair)
            shape = context.targets.experts.get(layer)
            if shape is None:
                context.problems.append(f"{pair.module}: layer {layer} of the base has no routed experts")
                continue
            stack = self._stack(pair, shape)
            if stack is None:
                context.problems.append(self._mismatch(pair, shape))
                continue
            seen[layer, stack].append(pair.module)
            self._check_version(pair, stack, shape, context)
            lora_rank = pair.a_shape[0] // shape.num_experts
            # A block-diagonal gate_up is two adapters of half the rank; `build` checks again once it can see B.
            limit = context.max_lora_rank * (2 if stack == "gate_up_proj" else 1)
            context.check_rank(pair.module, self._pattern_name(layer, stack), lora_rank, limit)
        for (layer, stack), modules in seen.items():
            if len(modules) > 1:
                context.problems.append(f"{' and '.join(modules)}: both are {stack} of layer {layer}")

    def build(
        self, pair: FactorPair, tensors: MutableMapping[str, Tensor], context: FormatContext, builder: AdapterBuilder
    ) -> None:
        """Split the stack into experts; those whose lora_B is all zero have no effect and are left out."""
        layer = self._layer(pair)
        shape = context.targets.experts[layer]
        stack = self._stack(pair, shape)
        if stack is None:
            raise ValueError(f"{pair.module} was not checked")
        a_stored, b_stored = take(pair, tensors)
        a_ERi = a_stored.view(shape.num_experts, -1, a_stored.shape[1])
        b_oRE = b_stored.view(b_stored.shape[0], -1, shape.num_experts)
        scale = context.rules.scale(self._pattern_name(layer, stack), a_ERi.shape[1])
        name = f"model.layers.{layer}.mlp.experts.{stack}"

        kept = b_oRE.ne(0).flatten(0, 1).any(dim=0).nonzero().flatten()
        if len(kept) < shape.num_experts:
            reason = f"lora_B of {shape.num_experts - len(kept)} of {shape.num_experts} experts is all zero, no effect"
            builder.skipped.append((name, reason))
            a_ERi, b_oRE = a_ERi[kept], b_oRE[:, :, kept]
        b_EoR = b_oRE.permute(2, 0, 1).contiguous()
        del a_stored, b_stored, b_oRE

        experts = kept.tolist()
        if stack == "down_proj":
            _add(builder, layer, experts, "down", a_ERi, b_EoR, scale)
            return
        parts = split_gate_up(a_ERi, b_EoR)
        if parts[0][0].shape[1] > context.max_lora_rank:
            context.problems.append(f"{name}: rank {a_ERi.shape[1]} is above the allowed {context.max_lora_rank}")
        _add(builder, layer, experts, "gate", *parts[0], scale)
        _add(builder, layer, experts, "up", *parts[1], scale)

    @staticmethod
    def _layer(pair: FactorPair) -> int:
        match = _MODULE.match(pair.module)
        if match is None:
            raise ValueError(f"{pair.module} is not a stack of experts")
        return int(match[1])

    @staticmethod
    def _pattern_name(layer: int, stack: Stack) -> str:
        """PEFT matches rank_pattern and alpha_pattern against the parameter's own name."""
        return f"model.layers.{layer}.mlp.experts.{stack}"

    @staticmethod
    def _stack(pair: FactorPair, shape: ExpertShape) -> Stack | None:
        """Which stack the shapes fit; (in, out) differ between the two for any sizes above zero."""
        if len(pair.a_shape) != 2 or len(pair.b_shape) != 2:
            return None
        rows, in_features = pair.a_shape
        if rows == 0 or rows % shape.num_experts or pair.b_shape[1] != rows:
            return None
        if (in_features, pair.b_shape[0]) == (shape.hidden, 2 * shape.intermediate):
            return "gate_up_proj"
        return "down_proj" if (in_features, pair.b_shape[0]) == (shape.intermediate, shape.hidden) else None

    @staticmethod
    def _mismatch(pair: FactorPair, shape: ExpertShape) -> str:
        found = f"{pair.module}: lora_A {list(pair.a_shape)}, lora_B {list(pair.b_shape)}"
        if len(pair.a_shape) != 2 or len(pair.b_shape) != 2:
            return f"{found}: stacked factors must be 2-D"
        if pair.a_shape[0] != pair.b_shape[1]:
            return f"{found}: rows of lora_A and columns of lora_B must be equal (rank x experts)"
        if pair.a_shape[0] == 0 or pair.a_shape[0] % shape.num_experts:
            return f"{found}: {pair.a_shape[0]} is not a multiple of the base's {shape.num_experts} experts"
        expected = (
            f"expected in/out {shape.hidden}/{2 * shape.intermediate} (gate_up_proj) or "
            f"{shape.intermediate}/{shape.hidden} (down_proj)"
        )
        dims = (pair.a_shape[1], pair.b_shape[0])
        if dims in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
            return f"{found}: {expected}; in and out are swapped, as PEFT 0.18 wrote them, which is not supported yet"
        cause = explain_hidden(dims[0], shape.hidden) or explain_hidden(dims[1], shape.hidden)
        return f"{found}: {expected}{cause}"

    @staticmethod
    def _check_origin(context: FormatContext) -> None:
        """Writers that share these keys and shapes but order the numbers differently must not be misread."""
        config = context.rules.raw
        order = config.get("lora_B_layout")
        auto_mapping = config.get("auto_mapping")
        unsloth = isinstance(auto_mapping, dict) and bool(auto_mapping.get("unsloth_fixed"))
        if order not in (None, "rank_major"):
            context.problems.append(
                f"adapter_config.json: lora_B_layout {str(order)[:40]!r} is not supported yet, only 'rank_major'"
            )
        elif order is None and unsloth:
            context.problems.append(
                "adapter_config.json: written by Unsloth without lora_B_layout, so the column order of lora_B is "
                "unknown; set lora_B_layout to 'rank_major' if it was saved by PEFT's own code"
            )

    @staticmethod
    def _check_version(pair: FactorPair, stack: Stack, shape: ExpertShape, context: FormatContext) -> None:
        """PEFT 0.18 swapped in and out; where both are equal, only the version tells the two apart."""
        version = context.rules.raw.get("peft_version")
        in_features, out_features = pair.a_shape[1], pair.b_shape[0]
        if in_features == out_features and isinstance(version, str) and _SWAPPED_VERSIONS.match(version):
            context.problems.append(
                f"{pair.module}: written by PEFT {version[:20]!r} with in and out of {stack} swapped, which is not "
                "supported yet; load and save the adapter with PEFT 0.19 or later"
            )


def split_gate_up(a_ERH: Tensor, b_EoR: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(A, B) of gate and of up from A [E, R, H] and B [E, 2I, R].

    Gate and up share A, unless every off-diagonal block of B is exactly zero: then each gets its own half of the rank.
    """
    half_out, half_rank = b_EoR.shape[1] // 2, b_EoR.shape[2] // 2
    gate_EIR, up_EIR = b_EoR[:, :half_out], b_EoR[:, half_out:]
    if b_EoR.shape[2] % 2 == 0 and not (gate_EIR[:, :, half_rank:].any() or up_EIR[:, :, :half_rank].any()):
        gate = (a_ERH[:, :half_rank], gate_EIR[:, :, :half_rank].contiguous())
        return gate, (a_ERH[:, half_rank:], up_EIR[:, :, half_rank:].contiguous())
    return (a_ERH, gate_EIR), (a_ERH, up_EIR)


def _add(
    builder: AdapterBuilder,
    layer: int,
    experts: list[int],
    projection: Projection,
    a_ERi: Tensor,
    b_EoR: Tensor,
    scale: float,
) -> None:
    has_effect = torch.stack([b.any() for b in b_EoR.unbind()]).tolist() if experts else []
    for expert, a, b, used in zip(experts, a_ERi.unbind(), b_EoR.unbind(), has_effect, strict=True):
        if used:
            builder.add_expert(layer, expert, projection, LoraPair(a, b, scale))
