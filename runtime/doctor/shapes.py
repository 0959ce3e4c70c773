"""The sizes that operations are checked at: DeepSeek-V3's, the demo's, and what a CPU is given of the large ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

from runtime.demo import MODEL_DIR
from runtime.models.deepseek.config import DeepseekConfig

REDUCTION = (
    "the widths of deepseek-v3 are kept; 4 of its 16 local experts are computed, and an eighth of its heads and of all "
    "numbers of tokens; the case with all 256 experts is left out"
)
_EXPERT_SHARE, _SHARE = 4, 8


@dataclass(frozen=True)
class Shapes:
    """One model's sizes, and how many tokens a step has.

    `num_experts` is the router's, `num_local_experts` those of one process, which is given a share of `num_processes`
    of the routed rows. `query_latent` is 0 where queries have none. `chunk_tokens` and `training_tokens` are
    attention's: one block of a prefill, one document.
    """

    name: str
    hidden: int
    expert_width: int
    num_experts: int
    num_local_experts: int
    num_processes: int
    num_chosen: int
    num_groups: int
    num_kept_groups: int
    num_heads: int
    query_latent: int
    latent: int
    rope: int
    nope: int
    value: int
    decode_tokens: int
    prefill_tokens: int
    context_tokens: int
    chunk_tokens: int
    training_tokens: int
    routed_scale: float = 2.5
    lora_rank: int = 16
    num_adapters: int = 8
    block_tokens: int = 16
    is_reduced: bool = False

    def tokens(self, phase: str) -> int:
        """Tokens of one step of a phase, `decode` or `prefill`."""
        return self.decode_tokens if phase == "decode" else self.prefill_tokens

    def routed_rows(self, num_tokens: int) -> int:
        """Rows of one process's experts when the choices are even."""
        return num_tokens * self.num_chosen // self.num_processes

    @property
    def scale(self) -> float:
        """Attention's scale, without YaRN's correction."""
        return float((self.nope + self.rope) ** -0.5)

    def reduced(self) -> Shapes:
        """What a CPU computes of them, as `REDUCTION` says."""
        return replace(
            self,
            num_local_experts=self.num_local_experts // _EXPERT_SHARE,
            num_heads=self.num_heads // _SHARE,
            decode_tokens=self.decode_tokens // _SHARE,
            prefill_tokens=self.prefill_tokens // _SHARE,
            context_tokens=self.context_tokens // _SHARE,
            chunk_tokens=self.chunk_tokens // _SHARE,
            training_tokens=self.training_tokens // _SHARE,
            is_reduced=True,
        )


DEEPSEEK_V3 = Shapes(
    name="deepseek-v3",
    hidden=7168,
    expert_width=2048,
    num_experts=256,
    num_local_experts=16,
    num_processes=16,
    num_chosen=8,
    num_groups=8,
    num_kept_groups=4,
    num_heads=128,
    query_latent=1536,
    latent=512,
    rope=64,
    nope=128,
    value=128,
    decode_tokens=128,
    prefill_tokens=4096,
    context_tokens=4096,
    chunk_tokens=512,
    training_tokens=1024,
)


def demo_shapes() -> Shapes:
    """The bundled model's, all experts in one process; raises ValueError if its config.json cannot be read."""
    config = DeepseekConfig.from_dir(MODEL_DIR)
    return Shapes(
        name="demo",
        hidden=config.hidden_size,
        expert_width=config.moe_intermediate_size,
        num_experts=config.n_routed_experts,
        num_local_experts=config.n_routed_experts,
        num_processes=1,
        num_chosen=config.num_experts_per_tok,
        num_groups=config.n_group,
        num_kept_groups=config.topk_group,
        num_heads=config.num_attention_heads,
        query_latent=config.q_lora_rank or 0,
        latent=config.kv_lora_rank,
        rope=config.qk_rope_head_dim,
        nope=config.qk_nope_head_dim,
        value=config.v_head_dim,
        decode_tokens=8,
        prefill_tokens=96,
        context_tokens=64,
        chunk_tokens=48,
        training_tokens=64,
        routed_scale=config.routed_scaling_factor,
        num_adapters=3,
    )
