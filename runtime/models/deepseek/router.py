"""The router: which experts each token goes to and with what weight, in float32 throughout."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.ops import reference_routing
from runtime.ops.routing import RoutingRule


class Router(nn.Module):
    """Sigmoid scores with a selection bias (V3, `noaux_tc`), or softmax scores (V2), both limited to groups.

    `forward` leaves the choice to the device's operation; the trainer, which needs gradients and looks at the scores
    in between, takes the same steps one by one.
    """

    def __init__(self, config: DeepseekConfig, placement: Placement) -> None:
        super().__init__()
        self.config = config
        self.rule = routing_rule(config)
        self.ops = placement.ops
        self.weight = placement.empty(config.n_routed_experts, config.hidden_size, dtype=torch.float32)
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = placement.empty(config.n_routed_experts, dtype=torch.float32)

    @property
    def bias_E(self) -> Tensor | None:
        """What steers the choice beside the scores; V3's alone."""
        return self.e_score_correction_bias if self.config.topk_method == "noaux_tc" else None

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, top-k] float32 and expert indices [T, top-k]."""
        return self.ops.choose_experts(self._logits(x_TH), self.bias_E, self.rule)

    def scores(self, x_TH: Tensor) -> Tensor:
        """Every expert's score [T, E], float32."""
        return reference_routing.scores(self._logits(x_TH), self.rule)

    def choose(self, scores_TE: Tensor) -> Tensor:
        """The experts [T, top-k] that each token goes to."""
        return reference_routing.choose(self.choice_scores(scores_TE), self.rule)

    def choice_scores(self, scores_TE: Tensor) -> Tensor:
        """What the choice is made by [T, E]: biased for V3, and out of reach in groups that are not open."""
        return reference_routing.choice_scores(scores_TE, self.bias_E, self.rule)

    def weigh(self, scores_TE: Tensor, experts: Tensor) -> Tensor:
        """The weights [T, top-k] of chosen experts; V2 does not renormalise."""
        return reference_routing.weigh(scores_TE, experts, self.rule)

    def _logits(self, x_TH: Tensor) -> Tensor:
        return torch.nn.functional.linear(x_TH.float(), self.weight)


def routing_rule(config: DeepseekConfig) -> RoutingRule:
    """The rule that config.json describes."""
    rule = RoutingRule(
        num_chosen=config.num_experts_per_tok,
        scoring="sigmoid" if config.scoring_func == "sigmoid" else "softmax",
        renormalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )
    if config.topk_method == "greedy":
        return rule
    grouped = replace(rule, num_groups=config.n_group, num_kept_groups=config.topk_group)
    if config.topk_method == "group_limited_greedy":
        # DeepSeek-V2 (arXiv:2405.04434, 2.2): a group counts as its best expert.
        return replace(grouped, group_score="best", masked=0.0)
    # DeepSeek-V3 (arXiv:2412.19437, 2.1.2): the bias steers the choice only, weights come from the scores.
    return replace(grouped, group_score="best two")
