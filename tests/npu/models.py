"""Random bases without transformers, engines and runners with a chosen operation table, and steps by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.config import EngineConfig
from runtime.demo import MODEL_DIR
from runtime.engine import start
from runtime.engine.batch import Batch, Chunk
from runtime.engine.messages import RequestId
from runtime.engine.runner import Runner
from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.model import DeepseekModel
from runtime.ops.base import Ops
from runtime.ops.cpu import CpuOps
from tests.oracle.adapters import KINDS, AdapterRecipe
from tests.oracle.driver import Driver, driven_engine

CPU = torch.device("cpu")
BLOCK_TOKENS = 16
# The widths that Ascend's attention operators are made for; all else is small.
OPERATOR_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
}
V2_LITE_CHOICE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "n_routed_experts": 12,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
}

EXPERTS_ONLY, HALF = ("routed_experts",), torch.bfloat16
RECIPES = {
    "everything-8": AdapterRecipe(KINDS, lora_rank=8, seed=1, dtype=HALF),
    "experts-16-third": AdapterRecipe(
        EXPERTS_ONLY, lora_rank=16, seed=2, covers=lambda layer, expert: (layer + expert) % 3 == 0, dtype=HALF
    ),
    "experts-32": AdapterRecipe(EXPERTS_ONLY, lora_rank=32, alpha=32.0, seed=3, dtype=HALF),
    "attention-4": AdapterRecipe(("kv_b_proj", "q_b_proj", "o_proj"), lora_rank=4, seed=4, dtype=HALF),
}


@dataclass(frozen=True)
class TinyBase:
    """A base on disk, with the demo's tokenizer."""

    path: Path


def write_base(path: Path, changes: Mapping[str, Any], seed: int = 0) -> TinyBase:
    """The demo's config with changes, and random weights of its shapes that bfloat16 holds without rounding."""
    path.mkdir(parents=True)
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8")) | dict(changes)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MODEL_DIR / name, path / name)
    model = DeepseekModel(DeepseekConfig.from_dir(path), Placement(CPU, torch.float32, CpuOps()))
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _random(name, tensor, generator).bfloat16() for name, tensor in model.destinations().items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return TinyBase(path)


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    shape = (like.shape[0] * like.shape[1], like.shape[2]) if like.dim() == 3 else like.shape
    drawn = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.2 * drawn
    if name.endswith("correction_bias"):
        return 0.1 * drawn
    # Router scores are spread, so that a choice seldom hangs on rounding.
    return drawn * (4.0 if name.endswith("mlp.gate.weight") else 1.0) * shape[-1] ** -0.5


@contextmanager
def engine_with(ops: Ops, base: Path, adapters: Sequence[Path], dtype: str) -> Iterator[Driver]:
    """An engine on CPU tensors whose device operations are `ops`; adapters are loaded under their folders' names."""
    config = EngineConfig(
        base, dtype=dtype, max_model_len=512, kv_cache_tokens=4096, max_batch_tokens=96, kv_block_tokens=BLOCK_TOKENS
    )
    with patch.object(start, "make_ops", lambda device: ops), driven_engine(config) as driver:
        for adapter in adapters:
            driver.load(adapter.name, adapter)
        yield driver


@dataclass
class Fed:
    """One sequence that is computed by hand: all its tokens, of which the first are its prompt."""

    tokens: list[int]
    num_prompt: int
    blocks: list[int]
    slot: int
    num_computed: int = 0

    def next_chunk(self, index: int, at_most: int) -> Chunk:
        """The next part of the prompt, or the next token."""
        start_ = self.num_computed
        self.num_computed += max(1, min(at_most, self.num_prompt - start_))
        ids = self.tokens[start_ : self.num_computed]
        return Chunk(RequestId(index), ids, start_, self.blocks, self.slot, samples=True)


def feed(
    runner: Runner, num_prompt_tokens: Sequence[int], slots: Sequence[int], num_steps: int, chunk_tokens: int = 20
) -> Tensor:
    """Given tokens, whatever the logits say, so that two back-ends see the same steps: [steps, sequences, vocabulary].

    Prompts go in chunks; those that are through decode beside the others. `slots` ascend.
    """
    fed, num_used = [], 0
    for index, (num_prompt, slot) in enumerate(zip(num_prompt_tokens, slots, strict=True)):
        num_tokens = num_prompt + num_steps
        blocks = range(num_used, num_used + -(-num_tokens // BLOCK_TOKENS))
        num_used = blocks.stop
        fed.append(Fed(random_tokens(num_tokens, index), num_prompt, list(blocks), slot))
    batches = (
        Batch([sequence.next_chunk(index, chunk_tokens) for index, sequence in enumerate(fed)])
        for _ in range(num_steps)
    )
    return torch.stack([runner.run(batch).logits for batch in batches])


def fed(
    ops: Ops,
    base: Path,
    adapters: Sequence[Path],
    dtype: str,
    num_steps: int,
    watch: Callable[[DeepseekModel], None] = lambda model: None,
) -> Tensor:
    """Prompts of very different lengths over the base and all adapters, then decode steps of all at once.

    Logits [steps, sequences, vocabulary], the base's two sequences first. `watch` is given the model before it runs.
    """
    slots = [-1, -1, *range(len(adapters))]
    with engine_with(ops, base, adapters, dtype) as driver:
        watch(driver.engine.runner.model)
        num_prompt_tokens = [7, 45, 30, 61, 1, 20, 33, 16][: len(slots)]
        return feed(driver.engine.runner, num_prompt_tokens, slots, num_steps)


def relative_errors(seen: Tensor, exact: Tensor) -> Tensor:
    """Of each token's logits: the root mean square of the difference over that of the exact ones."""
    return (seen - exact).square().mean(-1).sqrt() / exact.square().mean(-1).sqrt()


def random_tokens(num_tokens: int, seed: int) -> list[int]:
    """Token ids without special ones."""
    tokens: list[int] = torch.randint(2, 1000, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens
