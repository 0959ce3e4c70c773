"""The router: which experts each token goes to and with what weight, in float32 throughout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig


class Router(nn.Module):
    """Sigmoid scores with a selection bias (V3, `noaux_tc`), or softmax scores (V2), both limited to groups."""

    def __init__(self, config: DeepseekConfig, placement: Placement) -> None:
        super().__init__()
        self.config = config
        self.weight = placement.empty(config.n_routed_experts, config.hidden_size, dtype=torch.float32)
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = placement.empty(config.n_routed_experts, dtype=torch.float32)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, top-k] float32 and expert indices [T, top-k] int64."""
        scores_TE = self.scores(x_TH)
        experts = self.choose(scores_TE)
        return self.weigh(scores_TE, experts), experts

    def scores(self, x_TH: Tensor) -> Tensor:
        """Every expert's score [T, E], float32."""
        logits_TE = torch.nn.functional.linear(x_TH.float(), self.weight)
        return logits_TE.sigmoid() if self.config.scoring_func == "sigmoid" else logits_TE.softmax(-1)

    def choose(self, scores_TE: Tensor) -> Tensor:
        """The experts [T, top-k] that each token goes to."""
        return self.choice_scores(scores_TE).topk(self.config.num_experts_per_tok, dim=-1, sorted=False).indices

    def choice_scores(self, scores_TE: Tensor) -> Tensor:
        """What the choice is made by [T, E]: biased for V3, and out of reach in groups that are not open."""
        config = self.config
        if config.topk_method == "noaux_tc":
            # DeepSeek-V3 (arXiv:2412.19437, 2.1.2): the bias steers the choice only, weights come from the scores.
            choice_TE = scores_TE + self.e_score_correction_bias
            if config.n_group == 1:
                return choice_TE
            groups_TGE = choice_TE.unflatten(-1, (config.n_group, -1))
            return self._keep_groups(groups_TGE, groups_TGE.topk(2, dim=-1).values.sum(-1), float("-inf"))
        if config.topk_method == "group_limited_greedy":
            # DeepSeek-V2 (arXiv:2405.04434, 2.2): a group counts as its best expert.
            groups_TGE = scores_TE.unflatten(-1, (config.n_group, -1))
            return self._keep_groups(groups_TGE, groups_TGE.amax(-1), 0.0)
        return scores_TE

    def weigh(self, scores_TE: Tensor, experts: Tensor) -> Tensor:
        """The weights [T, top-k] of chosen experts; V2 does not renormalise."""
        weights = scores_TE.gather(1, experts)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.config.routed_scaling_factor

    def _keep_groups(self, groups_TGE: Tensor, group_scores_TG: Tensor, masked: float) -> Tensor:
        chosen = group_scores_TG.topk(self.config.topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, chosen, False)
        return groups_TGE.masked_fill(dropped[..., None], masked).flatten(1)
