"""Join the LoRA shards of a MindSpeed-LLM (Megatron) checkpoint into one adapter.

Rank and alpha are not in the files: they are given. E experts, e local experts of one expert-parallel process, r rank,
H hidden, I intermediate, t tensor-parallel size. Grouped experts (`weight1`: gate and up, `weight2`: down) are stored
expert-major whatever their nominal shape: weight1_lora_a [e, H, r], weight1_lora_b [e, r, 2I/t] (each process holds
its own halves of gate and up), weight2_lora_a [e, I/t, r], weight2_lora_b [e, r, H].
"""

import hashlib
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loaders.adapter_formats.base import AdapterBuilder
from loaders.adapter_formats.stacks import add_gate_up, add_stack, report_idle
from loaders.adapter_types import AdapterTargets, AdapterWeights, LoraPair, num_kept_bytes
from loaders.errors import AdapterError
from loaders.finite import non_finite
from loaders.megatron.archive import ShardTensor
from loaders.megatron.join import Misfit, column_parallel, joined_experts, row_parallel, same_shapes
from loaders.megatron.names import MegatronKey, split_key
from loaders.megatron.shards import Place, ShardGrid, open_grid, rank_folders

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_EXPERTS = "mlp.experts."


@dataclass(frozen=True)
class MegatronSettings:
    """What the training command said and the files do not: `--lora-r` and `--lora-alpha`."""

    lora_rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.lora_rank


def is_megatron(path: Path) -> bool:
    """Whether there are mp_rank_* folders at `path`, or in the newest iteration below it."""
    return bool(rank_folders(path))


def load_megatron(path: Path, targets: AdapterTargets, settings: MegatronSettings) -> AdapterWeights:
    """Load all shards below `path`; raises AdapterError with every problem."""
    folders = rank_folders(path)
    if not folders:
        raise AdapterError(f"{path}: no mp_rank_* folders")
    with ExitStack() as stack:
        grid = open_grid(folders, targets.num_hidden_layers, stack)
        join = _Join(grid, targets, settings)
        join.add_all()
    if not join.problems and not (join.builder.linears or join.builder.experts()):
        join.problems.append("no LoRA factors with an effect in the files")
    if join.problems:
        noun = "problem" if len(join.problems) == 1 else "problems"
        raise AdapterError(f"{path}: {len(join.problems)} {noun} with the shards", join.problems)
    skipped = list(join.builder.skipped)
    if join.num_other:
        skipped.append((f"{join.num_other} tensors", "weights of the base, not read"))
    builder = join.builder
    experts = builder.experts()
    digest = "sha256:" + join.sha.hexdigest()
    evidence = (grid.evidence, f"rank {settings.lora_rank} and alpha {settings.alpha:g} as given")
    return AdapterWeights(
        linears=builder.linears,
        experts=experts,
        hashed=lambda: digest,
        config={},
        layout="MindSpeed-LLM shards",
        skipped=tuple(skipped),
        num_bytes=num_kept_bytes(builder.linears, experts),
        warnings=(),
        evidence=evidence,
    )


@dataclass
class _Join:
    """Collects the parts of every factor and puts them together."""

    grid: ShardGrid
    targets: AdapterTargets
    settings: MegatronSettings
    builder: AdapterBuilder = field(default_factory=AdapterBuilder)
    problems: list[str] = field(default_factory=list)
    num_other: int = 0

    def __post_init__(self) -> None:
        self.sha = hashlib.sha256()
        self._seen: dict[bool, set[int]] = {False: set(), True: set()}

    def add_all(self) -> None:
        """Every factor of every stage; names that hold `lora` and are no factor are problems."""
        for stage, first_layer in enumerate(self.grid.first_layers):
            parts: dict[tuple[int, str], dict[tuple[str, int | None], dict[Place, ShardTensor]]] = {}
            for place, tensors in self.grid.files.items():
                for name, tensor in tensors.items() if place.pp == stage else ():
                    key = split_key(name)
                    if key is not None:
                        layer = first_layer + key.layer
                        parts.setdefault((layer, key.module), {}).setdefault(_slot(key), {})[place] = tensor
                        if len(tensor.shape) != 2:
                            self.problems.append(f"{name}: {list(tensor.shape)} is not 2-D")
                        elif tensor.dtype not in _DTYPES:
                            self.problems.append(f"{name}: not stored in float32, float16 or bfloat16")
                    elif "lora" in name:
                        self.problems.append(f"{name[:200]}: not a LoRA factor this loader knows")
                    else:
                        self.num_other += 1
            if self.problems:
                return
            for (layer, module), factors in sorted(parts.items(), key=lambda item: item[0]):
                try:
                    self._add(layer, module, factors)
                except Misfit as misfit:
                    self.problems.append(f"layer {layer}, {module}: {misfit}")

    def _add(self, layer: int, module: str, parts: dict[tuple[str, int | None], dict[Place, ShardTensor]]) -> None:
        if module.startswith(_EXPERTS):
            self._add_experts(layer, module.removeprefix(_EXPERTS), parts)
            return
        sides = {side: self._by_rank(found) for (side, _), found in parts.items()}
        if sides.keys() != {"A", "B"}:
            raise Misfit(f"has lora_{''.join(sides)} alone")
        prefix = f"model.layers.{layer}."
        if module.endswith("linear_qkv"):
            self._add_qkv(prefix + "self_attn.", sides["A"], sides["B"])
        elif module.endswith("linear_proj"):
            pair = row_parallel(sides["A"], sides["B"])
            self._add_linear(prefix + "self_attn.o_proj", *pair)
        elif module.endswith("linear_fc2"):
            self._add_linear(prefix + module.replace("linear_fc2", "down_proj"), *row_parallel(sides["A"], sides["B"]))
        else:
            a, b = column_parallel(sides["A"], sides["B"])
            for name, half in zip(("gate_proj", "up_proj"), b.chunk(2), strict=True):
                self._add_linear(prefix + module.replace("linear_fc1", name), a, half)

    def _add_qkv(self, prefix: str, a: list[Tensor], b: list[Tensor]) -> None:
        """Rows of q (or q_a), then of kv_a; both share lora_A."""
        if len(b) > 1:
            raise Misfit("linear_qkv split over tensor-parallel processes is not supported, only tp 1")
        query = "q_a_proj" if f"{prefix}q_a_proj" in self.targets.linears else "q_proj"
        names = [prefix + query, prefix + "kv_a_proj_with_mqa"]
        rows = [self.targets.linears.get(name, (0, 0))[0] for name in names]
        if sum(rows) != b[0].shape[0]:
            raise Misfit(f"lora_B has {b[0].shape[0]} rows, {query} and kv_a_proj_with_mqa of the base {sum(rows)}")
        for name, part in zip(names, b[0].split(rows), strict=True):
            self._add_linear(name, a[0], part)

    def _add_linear(self, name: str, a: Tensor, b: Tensor) -> None:
        dims = self.targets.linears.get(name)
        if dims is None:
            raise Misfit(f"the base has no {name}")
        rank = self.settings.lora_rank
        if tuple(a.shape) != (rank, dims[1]) or tuple(b.shape) != (dims[0], rank):
            raise Misfit(
                f"lora_A {list(a.shape)} and lora_B {list(b.shape)} of {name}, expected [{rank}, {dims[1]}] and "
                f"[{dims[0]}, {rank}] for this base and --rank {rank}"
            )
        if bool(a.any()) and bool(b.any()):
            self.builder.linears[name] = LoraPair(a, b, self.settings.scale)
        else:
            self.builder.skipped.append((name, "a factor is all zero, no effect"))

    def _add_experts(
        self, layer: int, module: str, parts: dict[tuple[str, int | None], dict[Place, ShardTensor]]
    ) -> None:
        shape = self.targets.experts.get(layer)
        if shape is None:
            raise Misfit("the base has no routed experts in this layer")
        is_gate_up = module in ("weight1", "linear_fc1")
        num_out, num_in = (2 * shape.intermediate, shape.hidden) if is_gate_up else shape.dims("down")
        if layer in self._seen[is_gate_up]:
            raise Misfit("experts both grouped (weight1, weight2) and one by one (local_experts)")
        self._seen[is_gate_up].add(layer)
        stacks = [self._expert_stack(parts, side, layer, module) for side in "AB"]
        rank, num = self.settings.lora_rank, shape.num_experts
        wanted = [(num, rank, num_in), (num, num_out, rank)]
        if [tuple(stack.shape) for stack in stacks] != wanted:
            found = " and ".join(str(list(stack.shape)) for stack in stacks)
            cause = "; experts that are not split over tp are not supported" if self.grid.tp_size > 1 else ""
            raise Misfit(f"factors {found} once joined, expected {list(wanted[0])} and {list(wanted[1])}{cause}")
        name = f"model.layers.{layer}.mlp.experts.{'gate_up_proj' if is_gate_up else 'down_proj'}"
        if is_gate_up:
            _, num_idle = add_gate_up(self.builder, layer, (stacks[0], stacks[1]), self.settings.scale, num)
        else:
            num_idle = add_stack(self.builder, layer, "down", (stacks[0], stacks[1]), self.settings.scale, num)
        report_idle(self.builder, name, num_idle, num)

    def _expert_stack(
        self, parts: dict[tuple[str, int | None], dict[Place, ShardTensor]], side: str, layer: int, module: str
    ) -> Tensor:
        """A [E, r, in] or B [E, out, r] of all experts of a layer."""
        slots = sorted((slot for slot in parts if slot[0] == side), key=lambda slot: slot[1] or 0)
        if not slots or (len(slots) > 1 and [slot[1] for slot in slots] != list(range(len(slots)))):
            raise Misfit(f"lora_{side} is missing, or that of some experts")
        pieces = []
        for ep in range(self.grid.ep_size):
            for slot in slots:
                by_tp = [self._read(parts[slot].get(place)) for place in self._places(parts[slot], ep)]
                if module.startswith("weight"):
                    by_tp = [self._grouped(tensor, layer, module, side) for tensor in by_tp]
                else:
                    by_tp = [tensor.unsqueeze(0) for tensor in by_tp]
                pieces.append(joined_experts(by_tp, is_first=module in ("weight1", "linear_fc1"), side=side))
        same_shapes(pieces)
        return torch.cat(pieces)

    def _grouped(self, stored: Tensor, layer: int, module: str, side: str) -> Tensor:
        """[e, r, in] or [e, out, r] of one process's grouped experts, of whatever nominal shape."""
        hidden = self.targets.experts[layer].hidden
        rank = self.settings.lora_rank
        if (module, side) == ("weight1", "A"):
            view = (-1, hidden, rank)
        elif (module, side) == ("weight2", "B"):
            view = (-1, rank, hidden)
        else:
            num_local = self.targets.experts[layer].num_experts // self.grid.ep_size
            view = (num_local, -1, rank) if side == "A" else (num_local, rank, -1)
        if stored.numel() == 0 or math.prod(view) == 0 or stored.numel() % abs(math.prod(view)):
            raise Misfit(f"{module}_lora_{side.lower()} {list(stored.shape)} does not fit --rank {rank} and this base")
        return stored.reshape(view).transpose(1, 2).contiguous()

    def _places(self, found: dict[Place, ShardTensor], ep: int) -> list[Place]:
        pp = next(iter(found)).pp
        return [Place(tp, pp, ep) for tp in range(self.grid.tp_size)]

    def _by_rank(self, found: dict[Place, ShardTensor]) -> list[Tensor]:
        """The tensor of each tensor-parallel rank; what expert-parallel processes repeat must be equal."""
        result = []
        for place in self._places(found, 0):
            copies = [self._read(found.get(Place(place.tp, place.pp, ep))) for ep in range(self.grid.ep_size)]
            if not all(torch.equal(copies[0], copy) for copy in copies[1:]):
                raise Misfit("differs between expert-parallel processes, which should hold copies")
            result.append(copies[0])
        return result

    def _read(self, tensor: ShardTensor | None) -> Tensor:
        if tensor is None:
            raise Misfit("is missing in some of the mp_rank_* folders")
        value = tensor.read()
        for problem in non_finite({"a factor": value}):
            raise Misfit(problem)
        self.sha.update(value.contiguous().view(torch.uint8).numpy().data if value.numel() else b"")
        return value


def _slot(key: MegatronKey) -> tuple[str, int | None]:
    return key.side, key.expert
