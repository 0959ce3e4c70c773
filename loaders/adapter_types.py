"""The plain data of adapters: what a base offers, and what an adapter file turns into."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ExpertShape:
    """Routed experts of one layer: gate and up are [intermediate, hidden], down is [hidden, intermediate]."""

    num_experts: int
    hidden: int
    intermediate: int

    def dims(self, projection: str) -> tuple[int, int]:
        """(out, in) of one expert's `gate`, `up` or `down`."""
        return (self.hidden, self.intermediate) if projection == "down" else (self.intermediate, self.hidden)


@dataclass(frozen=True)
class AdapterTargets:
    """What a base offers to adapters: linear modules as (out, in) by disk name, and experts by layer index."""

    linears: Mapping[str, tuple[int, int]]
    experts: Mapping[int, ExpertShape]
    num_hidden_layers: int
    model_type: str | None = None


@dataclass(frozen=True)
class LoraPair:
    """delta W = scale * b @ a, with a [r, in] and b [out, r] in their stored dtype; the scale is not folded in.

    A factor that the file has once for all experts of a layer is marked: the very same tensor object stands in the
    pair of each expert, so it can be kept once.
    """

    a: Tensor
    b: Tensor
    scale: float
    a_is_shared: bool = False
    b_is_shared: bool = False

    @property
    def lora_rank(self) -> int:
        """The rank r."""
        return self.a.size(0)


@dataclass(frozen=True)
class ExpertLora:
    """The factors of one routed expert; None where a projection is not adapted."""

    gate: LoraPair | None = None
    up: LoraPair | None = None
    down: LoraPair | None = None


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter in the form the runtime uses; experts it does not change are not in `experts`.

    `num_bytes` counts the factors kept (a shared one once); `skipped` holds (key, reason), `evidence` says how the
    layout was recognised. `hashed` gives the digest once all bytes are hashed, which may take longer than reading them.
    """

    linears: Mapping[str, LoraPair]
    experts: Mapping[int, Mapping[int, ExpertLora]]
    hashed: Callable[[], str]
    config: Mapping[str, Any]
    layout: str
    skipped: tuple[tuple[str, str], ...]
    num_bytes: int
    warnings: tuple[str, ...]
    evidence: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """`sha256:` and the digest of all bytes that were read."""
        return self.hashed()


def num_kept_bytes(linears: Mapping[str, LoraPair], experts: Mapping[int, Mapping[int, ExpertLora]]) -> int:
    """Bytes of all factors, those that several modules share counted once."""
    pairs = list(linears.values())
    for layer in experts.values():
        for expert in layer.values():
            pairs += [pair for pair in (expert.gate, expert.up, expert.down) if pair is not None]
    factors = {(factor.data_ptr(), factor.nbytes) for pair in pairs for factor in (pair.a, pair.b)}
    return sum(num_bytes for _, num_bytes in factors)


@dataclass(frozen=True)
class ExpertWeights:
    """Full weights of one routed expert in their stored dtype: gate and up [I, H], down [H, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class ReplacementExperts:
    """An ESFT adapter: experts that take the place of the base's, by layer and expert.

    `digest`, `skipped` and `num_bytes` as in AdapterWeights; `config` is expert_cfg.json.
    """

    experts: Mapping[int, Mapping[int, ExpertWeights]]
    digest: str
    config: Mapping[str, Any]
    skipped: tuple[tuple[str, str], ...]
    num_bytes: int
