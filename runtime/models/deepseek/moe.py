"""The mixture of experts: one sort of the routed rows serves the base's experts and every adapter's pages.

Shape suffixes: T tokens, E experts, G groups (the base's experts, then those that adapters bring), H hidden, I expert
width, M routed rows (T x top-k), sorted by expert, J panels of W columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from runtime.layers.lora_site import StepLora
from runtime.layers.mlp import GatedMlp
from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.router import Router


@dataclass(frozen=True)
class ExpertGroups:
    """Weights of experts, ready for grouped_matmul: w13 [G, H, 2I] (gate, then up) and w2 [G, I, H], in panels."""

    w13: Tensor
    w2: Tensor

    def __getitem__(self, groups: slice) -> ExpertGroups:
        """Some of the groups, without a copy."""
        return ExpertGroups(self.w13[groups], self.w2[groups])

    def destinations(self, group: int) -> dict[str, Tensor]:
        """Views [panels, columns, in] of an expert's gate, up and down, read in that order the rows on disk."""
        gate_up = self.w13[group].transpose(1, 2)
        gate, up = gate_up.chunk(2, dim=1 if gate_up.shape[0] == 1 else 0)
        return {"gate": gate, "up": up, "down": self.w2[group].transpose(1, 2)}


class RoutedExperts(nn.Module):
    """The base's experts, w13 and w2; `groups` are these and, after them, the spare ones that adapters bring."""

    def __init__(self, layer: int, config: DeepseekConfig, placement: Placement) -> None:
        super().__init__()
        self.layer = layer
        self.ops = placement.ops
        num_experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        columns13 = self.ops.panel_columns(2 * width, num_parts=2)
        columns2 = self.ops.panel_columns(hidden)
        num_groups = num_experts + placement.num_spare_experts
        w13 = placement.empty(num_groups, 2 * width // columns13, hidden, columns13)
        w2 = placement.empty(num_groups, hidden // columns2, width, columns2)
        self.groups = ExpertGroups(w13.data, w2.data)
        # Of the model's parameters only the base's own are: what adapters bring is none of its weights.
        self.w13 = nn.Parameter(self.groups.w13[:num_experts], requires_grad=False)
        self.w2 = nn.Parameter(self.groups.w2[:num_experts], requires_grad=False)

    def forward(self, x_TH: Tensor, weights: Tensor, experts: Tensor, lora: StepLora | None) -> Tensor:
        """Sum over each token's experts, weighted: [T, H], [T, top-k], [T, top-k] -> [T, H]."""
        w13: Tensor = self.w13
        w2: Tensor = self.w2
        brought = None if lora is None else lora.replace_experts(self.layer, experts)
        if brought is not None:
            experts, w13, w2 = brought, self.groups.w13, self.groups.w2
        num_experts = w13.shape[0]
        keys, keys_of_expert = (experts, 1) if lora is None else lora.route_keys(experts)
        rows = self.ops.sort_rows(x_TH, keys, num_experts * keys_of_expert)
        counts_E = rows.counts_G if lora is None else rows.counts_G.view(num_experts, keys_of_expert).sum(1)
        deltas = None if lora is None else lora.expert_deltas(self.layer, keys, rows, x_TH)
        gate_up = self.ops.grouped_matmul(rows.x_MH, w13, counts_E)
        if deltas is not None:
            deltas.add_gate_up_(gate_up, rows.x_MH)
        inner_MI = self.ops.swiglu(gate_up)
        y_MH = self.ops.grouped_matmul(inner_MI, w2, counts_E)
        if deltas is not None:
            deltas.add_down_(y_MH, inner_MI)
        combined_TH = self.ops.combine_experts(y_MH, rows, weights)
        if deltas is not None:
            deltas.add_combined_(combined_TH, weights)
        return combined_TH


class MixtureOfExperts(nn.Module):
    """Routed experts plus the shared experts that see every token."""

    def __init__(self, layer: int, config: DeepseekConfig, placement: Placement) -> None:
        super().__init__()
        self.gate = Router(config, placement)
        self.experts = RoutedExperts(layer, config, placement)
        self.shared_experts: GatedMlp | None = None
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            name = f"model.layers.{layer}.mlp.shared_experts"
            self.shared_experts = GatedMlp(name, config.hidden_size, width, placement)

    def forward(self, x_TH: Tensor, lora: StepLora | None) -> Tensor:
        """[T, H] -> [T, H]."""
        weights, experts = self.gate(x_TH)
        routed: Tensor = self.experts(x_TH, weights, experts, lora)
        if self.shared_experts is not None:
            routed += self.shared_experts(x_TH, lora)
        return routed
