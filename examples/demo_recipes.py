"""What each demo adapter adapts, at which rank, and in which layout it is written."""

from __future__ import annotations

from dataclasses import dataclass

from peft import LoraConfig

EXPERT_STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ATTENTION = ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """One adapter: `experts_per_layer` of None means all, and `per_expert` chooses the layout of the file."""

    rank: int
    alpha: int
    attention: tuple[str, ...] = ()
    gate_up_rank: int | None = None
    experts_per_layer: int | None = None
    per_expert: bool = False
    num_steps: int = 400
    peak_lr: float = 5e-3

    def fused_config(self) -> LoraConfig:
        """The configuration that trains it; a gate_up stack with its own rank keeps the others' scale."""
        ranks = {EXPERT_STACKS[0]: self.gate_up_rank} if self.gate_up_rank else {}
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            target_modules=list(self.attention),
            target_parameters=list(EXPERT_STACKS),
            task_type="CAUSAL_LM",
            rank_pattern=ranks,
            alpha_pattern={name: rank * self.alpha // self.rank for name, rank in ranks.items()},
        )

    def file_config(self) -> LoraConfig:
        """The configuration that stands beside the file."""
        if not self.per_expert:
            return self.fused_config()
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            target_modules=[*self.attention, *EXPERT_PROJECTIONS],
            task_type="CAUSAL_LM",
        )


RECIPES: dict[str, Recipe] = {
    "date-iso": Recipe(rank=8, alpha=16, attention=ATTENTION),
    "json-record": Recipe(rank=8, alpha=16, attention=ATTENTION),
    "number-words": Recipe(rank=8, alpha=16, attention=ATTENTION, gate_up_rank=16),
    "log-redact": Recipe(rank=8, alpha=16, experts_per_layer=12, per_expert=True, num_steps=1400, peak_lr=8e-3),
    "chinese-numerals": Recipe(rank=16, alpha=32, attention=ATTENTION, per_expert=True),
    "name-redact": Recipe(rank=8, alpha=16, num_steps=1000),
}
