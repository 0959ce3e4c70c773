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
        logits_TE = torch.nn.functional.linear(x_TH.float(), self.weight)
        if self.config.scoring_func == "sigmoid":
            return self._noaux_tc(logits_TE.sigmoid())
        return self._softmax_greedy(logits_TE.softmax(-1))

    def _noaux_tc(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """DeepSeek-V3 (arXiv:2412.19437, 2.1.2): the bias steers the choice only, weights come from the scores."""
        config = self.config
        choice_TE = scores_TE + self.e_score_correction_bias
        if config.n_group > 1:
            groups_TGE = choice_TE.unflatten(-1, (config.n_group, -1))
            best_two = groups_TGE.topk(2, dim=-1).values.sum(-1)
            choice_TE = self._keep_groups(groups_TGE, best_two, float("-inf"))
        experts = choice_TE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores_TE.gather(1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor, experts

    def _softmax_greedy(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """DeepSeek-V2 (arXiv:2405.04434, 2.2): a group counts as its best expert; no renormalisation."""
        config = self.config
        if config.topk_method == "group_limited_greedy":
            groups_TGE = scores_TE.unflatten(-1, (config.n_group, -1))
            scores_TE = self._keep_groups(groups_TGE, groups_TGE.amax(-1), 0.0)
        weights, experts = scores_TE.topk(config.num_experts_per_tok, dim=-1, sorted=False)
        return weights * config.routed_scaling_factor, experts

    def _keep_groups(self, groups_TGE: Tensor, group_scores_TG: Tensor, masked: float) -> Tensor:
        chosen = group_scores_TG.topk(self.config.topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, chosen, False)
        return groups_TGE.masked_fill(dropped[..., None], masked).flatten(1)
