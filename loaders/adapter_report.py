"""The text of `graft inspect`: what an adapter would change, in aligned columns."""

from collections import Counter
from collections.abc import Iterable

from loaders.adapter_types import AdapterTargets, AdapterWeights, ExpertLora, LoraPair

_MAX_LINES = 12


def describe(weights: AdapterWeights, targets: AdapterTargets) -> str:
    """Layout, digest, bytes, modules with ranks and scales, experts per layer, skipped keys and warnings."""
    lines = [
        f"layout     {weights.layout}",
        *(f"evidence   {evidence}" for evidence in weights.evidence),
        f"digest     {weights.digest}",
        f"bytes      {_bytes(weights.num_bytes)}",
        f"base       {targets.num_hidden_layers} layers, {len(targets.experts)} with routed experts",
    ]
    lines += _section("linear modules", _linear_rows(weights))
    lines += _section("routed experts", _expert_rows(weights, targets))
    lines += _section("skipped", [list(entry) for entry in _shorten(weights.skipped)])
    lines += _section("warnings", [[warning] for warning in weights.warnings])
    return "\n".join(lines)


def _section(title: str, rows: list[list[str]]) -> list[str]:
    if not rows:
        return ["", f"{title}: none"] if title not in ("skipped", "warnings") else []
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    text = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return ["", f"{title}:", *(f"  {line.rstrip()}" for line in text)]


def _linear_rows(weights: AdapterWeights) -> list[list[str]]:
    """One row per kind of module with equal rank and scale, over the layers that have it."""
    groups: dict[tuple[str, int, float], list[int]] = {}
    for module, pair in weights.linears.items():
        parts = module.split(".")
        in_layer = len(parts) > 3 and parts[1] == "layers"
        kind = ".".join(parts[3:]) if in_layer else module
        groups.setdefault((kind, pair.lora_rank, pair.scale), []).append(int(parts[2]) if in_layer else -1)
    return [
        [kind, f"layers {ranges(layers)}" if layers[0] >= 0 else "", f"rank {rank}", f"scale {scale:g}"]
        for (kind, rank, scale), layers in sorted(groups.items())
    ]


def _expert_rows(weights: AdapterWeights, targets: AdapterTargets) -> list[list[str]]:
    """One row per run of layers with the same experts, projections, ranks and scales."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for layer, experts in sorted(weights.experts.items()):
        total = targets.experts[layer].num_experts
        row = (f"{len(experts)} of {total} experts", ranges(experts, 6), *_projections(experts.values()))
        groups.setdefault(row, []).append(layer)
    return [[f"layers {ranges(layers)}", *row] for row, layers in groups.items()]


def _projections(experts: Iterable[ExpertLora]) -> tuple[str, str, str]:
    experts = list(experts)
    kinds = ("gate", "up", "down")
    count = Counter(kind for expert in experts for kind in kinds if getattr(expert, kind) is not None)
    present = " ".join(
        kind if count[kind] == len(experts) else f"{kind}({count[kind]})" for kind in kinds if count[kind]
    )
    pairs: list[LoraPair] = [pair for expert in experts for pair in (expert.gate, expert.up, expert.down) if pair]
    scales = sorted({pair.scale for pair in pairs})
    ranks = sorted({pair.lora_rank for pair in pairs})
    num_shared = sum(pair.a_is_shared or pair.b_is_shared for pair in pairs)
    shared = " (shared factors)" if num_shared else ""
    shown = f"scale {scales[0]:g}" if len(scales) == 1 else f"scales {scales[0]:g} to {scales[-1]:g}"
    return present, f"rank {ranges(ranks)}", shown + shared


def ranges(numbers: Iterable[int], max_ranges: int = 8) -> str:
    """`0-3,7,9-11`, cut with `...` after `max_ranges` ranges."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs[:max_ranges])
    return text + (",..." if len(runs) > max_ranges else "")


def _shorten(skipped: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """At most a dozen lines; the rest counted by reason."""
    shown = list(skipped[:_MAX_LINES])
    for reason, count in Counter(reason for _, reason in skipped[_MAX_LINES:]).items():
        shown.append((f"... and {count} more", reason))
    return shown


def _bytes(num_bytes: int) -> str:
    units = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
    rounded = next((f" ({num_bytes / size:.1f} {unit})" for unit, size in units if num_bytes >= size), "")
    return f"{num_bytes:,}{rounded}"
