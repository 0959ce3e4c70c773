"""The latent KV cache: which blocks are free, and the memory behind them."""

from __future__ import annotations

from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.ops.latent_cache import LatentCache


class BlockPool:
    """Blocks of `block_tokens` cache slots each; a sequence holds a list of them."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_tokens)

    def can_allocate(self, count: int) -> bool:
        """Whether `count` blocks are free."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; ask `can_allocate` first."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks asked, {len(self._free)} free")
        return [self._free.pop() for _ in range(count)]

    def free(self, blocks: list[int]) -> None:
        """Give blocks back and empty the caller's list, so that they cannot be given back twice."""
        self._free.extend(blocks)
        blocks.clear()


def make_caches(config: DeepseekConfig, placement: Placement, num_blocks: int, block_tokens: int) -> list[LatentCache]:
    """One for each layer, of zeros."""
    widths = (config.kv_lora_rank, config.qk_rope_head_dim)
    num_slots = num_blocks * block_tokens
    make = placement.ops.make_cache
    return [
        make(num_slots, block_tokens, widths, placement.dtype, placement.device)
        for _ in range(config.num_hidden_layers)
    ]
