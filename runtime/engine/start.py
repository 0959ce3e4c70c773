"""Building an engine: the base on its device, the cache, the adapter store, one token to warm up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from loaders.config_json import read_eos_token_ids
from runtime.adapters.host_adapter import FactorLayout
from runtime.adapters.lora_plan import BASE_SLOT
from runtime.adapters.spare_experts import room_of
from runtime.adapters.store import AdapterStore, StoreLimits
from runtime.config import EngineConfig
from runtime.engine.batch import Batch, Chunk
from runtime.engine.guides.store import GuideStore, make_setup
from runtime.engine.kv_cache import BlockPool
from runtime.engine.messages import EngineReady, RequestId
from runtime.engine.runner import Runner
from runtime.engine.sampler import Sampler
from runtime.engine.scheduler import Scheduler, SchedulerLimits
from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.model import DeepseekModel, load_model
from runtime.ops.base import make_ops
from runtime.ops.platform import open_device, resolve_dtype
from runtime.ops.step_cores import StepCores, keep_cores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineParts:
    """What an engine consists of."""

    ready: EngineReady
    scheduler: Scheduler
    runner: Runner
    adapters: AdapterStore
    guides: GuideStore
    sampler: Sampler
    cores: StepCores


def start(
    config: EngineConfig, wake: Callable[[], None], progress: Callable[[int, int], None] | None = None
) -> EngineParts:
    """Load and warm up; raises ValueError or CheckpointError naming what is wrong."""
    config.validate()
    model_config = DeepseekConfig.from_dir(config.model_path)
    max_model_len, num_blocks = cache_size(config, model_config)
    device = open_device(config.device)
    dtype = resolve_dtype(config.dtype, model_config.stored_dtype)
    ops = make_ops(device)
    check_replacement_experts(config, model_config)
    placement = Placement(device, dtype, ops, config.replacement_experts)
    model = load_model(config.model_path, model_config, placement, progress)
    adapters, adapter_bytes = make_store(config, model, wake)
    runner = Runner(model, adapters.pages, num_blocks, config.kv_block_tokens)
    eos = read_eos_token_ids(config.model_path)
    if max(eos, default=0) >= model_config.vocab_size:
        raise ValueError(f"eos_token_id {max(eos)} is beyond the vocabulary of {model_config.vocab_size}")
    scheduler_limits = SchedulerLimits(config.max_batch_tokens, config.max_batch_size, max_model_len, eos)
    scheduler = Scheduler(scheduler_limits, BlockPool(num_blocks, config.kv_block_tokens))
    runner.run(Batch([Chunk(RequestId(0), [0], 0, [0], BASE_SLOT, samples=True)]))
    cores = keep_cores() if config.reading_process and ops.core_share else StepCores()
    guides = GuideStore(
        make_setup(
            str(config.model_path / "tokenizer.json"),
            model_config.vocab_size,
            eos,
            cache_entries=config.guide_cache_entries,
            compile_seconds=config.guide_compile_seconds,
        ),
        wake,
    )
    ready = EngineReady(
        model_kind=model_config.model_type,
        max_model_len=max_model_len,
        vocab_size=model_config.vocab_size,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        kv_cache_tokens=num_blocks * config.kv_block_tokens,
        adapter_bytes_limit=adapter_bytes.device,
        dtype=str(dtype).removeprefix("torch."),
        adapter_host_bytes_limit=adapter_bytes.host,
    )
    return EngineParts(ready, scheduler, runner, adapters, guides, Sampler(eos), cores)


@dataclass(frozen=True)
class AdapterBytes:
    """The most that adapters may take; on the device that is pages and the room for replacement experts."""

    device: int
    host: int


def make_store(
    config: EngineConfig, model: DeepseekModel, wake: Callable[[], None]
) -> tuple[AdapterStore, AdapterBytes]:
    """The adapter store of a loaded base, and its bounds."""
    placement, targets = model.placement, model.config.adapter_targets()
    spare = model.expert_groups() if config.replacement_experts else {}
    room = room_of(spare, model.config.n_routed_experts)
    if spare:
        told = "room for %d replacement experts in each of %d layers takes %d bytes beside --adapter-memory-gib"
        logger.info(told, room.num_experts, len(spare), room.num_bytes)
    page_bytes = int(config.adapter_memory_gib * 2**30)
    host_bytes = int(config.adapter_host_memory_gib * 2**30) or 2 * (page_bytes + room.num_bytes)
    limits = StoreLimits(
        config.max_adapters,
        config.max_lora_rank,
        page_bytes,
        host_bytes,
        config.adapter_cycle_seconds,
        max_copy_bytes=placement.ops.max_copy_bytes,
        core_share=placement.ops.core_share,
    )
    layout = FactorLayout.of(placement.ops)
    store = AdapterStore(
        targets, limits, placement.device, placement.dtype, wake, layout, spare, reading_process=config.reading_process
    )
    return store, AdapterBytes(page_bytes + room.num_bytes, host_bytes)


def check_replacement_experts(config: EngineConfig, model: DeepseekConfig) -> None:
    """Raise ValueError if this base has nothing to replace."""
    count = config.replacement_experts
    if count and not model.adapter_targets().experts:
        raise ValueError(f"replacement_experts = {count}, but the base has no routed experts to replace")


def cache_size(config: EngineConfig, model: DeepseekConfig) -> tuple[int, int]:
    """(longest sequence in tokens, number of cache blocks); raises ValueError if they contradict each other."""
    longest = model.max_position_embeddings
    if config.max_model_len > longest:
        raise ValueError(f"max_model_len = {config.max_model_len} is beyond the model's own {longest}")
    max_model_len = config.max_model_len or longest
    if max_model_len < 2:
        raise ValueError(f"max_model_len = {max_model_len} leaves no room for a prompt and an answer: 2 or more")
    if not config.kv_cache_tokens:
        blocks = -(-max_model_len // config.kv_block_tokens) + config.max_batch_size
        return max_model_len, blocks
    blocks = config.kv_cache_tokens // config.kv_block_tokens
    if not blocks:
        raise ValueError(f"kv_cache_tokens = {config.kv_cache_tokens} is less than a block of {config.kv_block_tokens}")
    if config.max_model_len > blocks * config.kv_block_tokens:
        raise ValueError(
            f"kv_cache_tokens = {config.kv_cache_tokens} cannot hold one sequence of max_model_len "
            f"= {config.max_model_len}: raise the one or lower the other"
        )
    if max_model_len > blocks * config.kv_block_tokens:
        max_model_len = blocks * config.kv_block_tokens
        logger.info("sequences are limited to %d tokens by kv_cache_tokens", max_model_len)
    return max_model_len, blocks
