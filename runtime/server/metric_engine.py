"""What the engine tells of itself, read from its latest stats when they are scraped."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from runtime.engine.messages import EngineStats
from runtime.server.metric_series import MODEL_LABEL, PREFIX


def engine_families(model_name: str, stats: EngineStats) -> Iterator[Metric]:
    """One family for each number; the ones of adapter memory carry the tier."""
    gauges = {
        "requests_running": ("Sequences in the batch", stats.running),
        "requests_waiting": ("Sequences waiting for a place", stats.waiting),
        "requests_paused": ("Sequences in the batch that wait for their readers", stats.paused),
        "kv_cache_usage_ratio": ("Used share of the KV cache", stats.kv_tokens_used / max(1, stats.kv_tokens_total)),
        "adapters_resident": ("Adapters in device memory", stats.adapters_resident),
        "adapter_vacant_bytes": ("Bytes of device pages that adapters have left", stats.adapter_vacant_bytes),
        "adapter_fragmentation_ratio": ("Vacant share of the bytes of all device pages", _vacant_share(stats)),
    }
    for name, (text, value) in gauges.items():
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=[MODEL_LABEL])
        gauge.add_metric([model_name], value)
        yield gauge
    preemptions = CounterMetricFamily(
        f"{PREFIX}preemptions", "Sequences put back because KV blocks ran out", labels=[MODEL_LABEL]
    )
    preemptions.add_metric([model_name], stats.preemptions)
    yield preemptions
    tiers = GaugeMetricFamily(f"{PREFIX}adapter_bytes", "Bytes of loaded adapters", labels=[MODEL_LABEL, "tier"])
    tiers.add_metric([model_name, "device"], stats.adapter_device_bytes)
    tiers.add_metric([model_name, "host"], stats.adapter_host_bytes)
    yield tiers
    yield from _tier_families(model_name, stats)
    waiting = GaugeMetricFamily(
        f"{PREFIX}requests_waiting_for_adapter",
        "Requests whose adapter is not on the device, by what they wait for",
        labels=[MODEL_LABEL, "reason"],
    )
    waiting.add_metric([model_name, "files"], stats.waiting_for_files)
    waiting.add_metric([model_name, "place"], stats.waiting_for_device)
    yield waiting


def _vacant_share(stats: EngineStats) -> float:
    return stats.adapter_vacant_bytes / max(1, stats.adapter_vacant_bytes + stats.adapter_device_bytes)


def _tier_families(model_name: str, stats: EngineStats) -> Iterator[Metric]:
    """Counters of the two tiers of adapter memory."""
    counters = {
        "adapter_hits": (
            "Requests that found their adapter there when they came",
            stats.adapter_device_hits,
            stats.adapter_host_hits,
        ),
        "adapter_loads": ("Adapters that came in", stats.adapter_device_loads, stats.adapter_host_loads),
        "adapter_evictions": (
            "Adapters that left for others, the least recently used first",
            stats.adapter_device_evictions,
            stats.adapter_host_evictions,
        ),
    }
    for name, (text, on_device, in_host_memory) in counters.items():
        counter = CounterMetricFamily(PREFIX + name, text, labels=[MODEL_LABEL, "tier"])
        counter.add_metric([model_name, "device"], on_device)
        counter.add_metric([model_name, "host"], in_host_memory)
        yield counter
