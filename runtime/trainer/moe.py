"""The mixture of experts in training: router, balance, dispatch of rows to experts wherever they lie, shared experts.

Shape suffixes: T tokens, K choices of a token, C = T x K choices, S rows sent, N rows received, M routed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from runtime.distributed.collectives import enter_parallel, exchange_rows, leave_parallel
from runtime.distributed.mesh import Mesh
from runtime.layers.placement import Placement
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.router import Router
from runtime.trainer.balance import add_to_gradients, balance_loss, limit_load
from runtime.trainer.config import RoutingConfig
from runtime.trainer.expert_rows import ExpertRows
from runtime.trainer.lora import LoraGroupedExperts, LoraSpec
from runtime.trainer.micro_batch import MicroBatch
from runtime.trainer.mlp import LoraGatedMlp


@dataclass
class RoutingStatistics:
    """Sums since the last reading: choices that were dropped, all choices, and the balance loss of the layer.

    A micro-batch counts once, also where checkpointing computes it again.
    """

    num_dropped: int = 0
    num_choices: int = 0
    balance_loss: float = 0.0
    counted: set[int] = field(default_factory=set)


RoutingObserver = Callable[[Tensor, Tensor, MicroBatch], None]


class TrainingMoe(nn.Module):
    """Routed experts of this process and its part of the shared ones; the result is summed over tp."""

    def __init__(
        self,
        layer: int,
        config: DeepseekConfig,
        placement: Placement,
        mesh: Mesh,
        specs: Mapping[str, LoraSpec],
        routing: RoutingConfig,
    ) -> None:
        super().__init__()
        name = f"model.layers.{layer}.mlp"
        self.mesh, self.routing = mesh, routing
        self.per_process = config.n_routed_experts // mesh.ep.size
        first = self.per_process * mesh.ep.rank
        widths = (config.hidden_size, config.moe_intermediate_size)
        experts = range(first, first + self.per_process)
        self.gate = Router(config, placement)
        self.experts = LoraGroupedExperts(f"{name}.experts", experts, widths, placement, specs.get(f"{name}.experts"))
        self.shared_experts: LoraGatedMlp | None = None
        if config.n_shared_experts:
            self.shared_experts = LoraGatedMlp(f"{name}.shared_experts", config, placement, mesh.tp, specs)
        self.statistics = RoutingStatistics()
        self.observe_routing: RoutingObserver | None = None

    def forward(self, x_TH: Tensor, batch: MicroBatch) -> Tensor:
        """[T, H] -> [T, H]."""
        x_TH = enter_parallel(x_TH, self.mesh.tp)
        scores_TE = self.gate.scores(x_TH)
        experts_TK = self.gate.choose(scores_TE.detach())
        keep_TK = None
        balance = balance_loss(scores_TE, experts_TK, batch) if self.routing.aux_loss and self.training else None
        if self.routing.capacity_factor is not None and self.training:
            reroute = self.routing.overflow == "reroute"
            factor = self.routing.capacity_factor
            experts_TK, keep_TK = limit_load(self.gate, scores_TE, experts_TK, batch, factor, reroute=reroute)
        weights_TK = self.gate.weigh(scores_TE, experts_TK)
        self._count(balance, keep_TK, batch)
        if keep_TK is None and batch.has_padding:  # all of it would go to the same few experts
            keep_TK = batch.is_real_T[:, None].expand_as(experts_TK)
        if balance is not None:
            # Every tp process computes the whole balance loss, and `enter_parallel` sums their gradients.
            weights_TK = add_to_gradients(weights_TK, balance * (self.routing.aux_loss / self.mesh.tp.size))
        if self.observe_routing is not None:
            self.observe_routing(weights_TK.detach(), experts_TK, batch)
        routed = self._routed(x_TH, weights_TK, experts_TK, keep_TK, batch.ids_T)
        if self.shared_experts is not None:
            routed = routed + self.shared_experts(x_TH, batch.ids_T)
        return leave_parallel(routed, self.mesh.tp)

    def reset_statistics(self) -> None:
        """Begin to count anew."""
        self.statistics = RoutingStatistics()

    def _count(self, balance: Tensor | None, keep_TK: Tensor | None, batch: MicroBatch) -> None:
        # Not in evaluation, whose batches are gone when the next ones may get their ids.
        if (balance is None and keep_TK is None) or id(batch) in self.statistics.counted:
            return
        self.statistics.counted.add(id(batch))
        if balance is not None:
            self.statistics.balance_loss += float(balance.detach())
        if keep_TK is not None:
            num_choices = int(batch.is_real_T.sum()) * keep_TK.shape[1]
            self.statistics.num_choices += num_choices
            self.statistics.num_dropped += num_choices - int(keep_TK.sum())

    def _routed(
        self, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, keep_TK: Tensor | None, ids_T: Tensor
    ) -> Tensor:
        num_choices = experts_TK.shape[1]
        experts_C = experts_TK.flatten()
        owner_C = experts_C // self.per_process
        keys_C = torch.where(owner_C % self.mesh.tp.size == self.mesh.tp.rank, experts_C, self.per_process << 20)
        if keep_TK is not None:
            keys_C = torch.where(keep_TK.flatten(), keys_C, self.per_process << 20)
        order_C = keys_C.argsort(stable=True)
        sent_S = order_C[: int((keys_C < self.per_process << 20).sum())]
        token_of_S = sent_S.div(num_choices, rounding_mode="floor")
        gates_S = weights_TK.flatten()[sent_S]
        ids_S = ids_T[token_of_S] * (self.per_process * self.mesh.ep.size) + experts_C[sent_S]
        if self.mesh.expert_column.size == 1:
            places_TK = torch.full_like(experts_TK, len(sent_S))
            places_TK.view(-1)[sent_S] = torch.arange(len(sent_S), device=sent_S.device)
            rows = self._rows(token_of_S, places_TK, experts_C[sent_S], ids_S)
            return self.experts(x_TH, gates_S, rows)  # type: ignore[no-any-return]
        y_SH = self._exchanged(x_TH.index_select(0, token_of_S), gates_S, experts_C[sent_S], ids_S)
        sum_TH = torch.zeros_like(x_TH, dtype=torch.float32).index_add(0, token_of_S, y_SH.float())
        return sum_TH.to(x_TH.dtype)

    def _exchanged(self, x_SH: Tensor, gates_S: Tensor, experts_S: Tensor, ids_S: Tensor) -> Tensor:
        """Send the rows to the replicas that hold their experts, compute what comes in, send the results back."""
        column = self.mesh.expert_column
        replica_S = experts_S // (self.per_process * self.mesh.tp.size)
        num_sent_R = torch.bincount(replica_S, minlength=column.size)
        num_received_R = exchange_rows(num_sent_R, [1] * column.size, [1] * column.size, column)
        num_sent, num_received = num_sent_R.tolist(), num_received_R.tolist()
        x_NH = exchange_rows(x_SH, num_sent, num_received, column)
        gates_N = exchange_rows(gates_S[:, None], num_sent, num_received, column)[:, 0]
        experts_N = exchange_rows(experts_S, num_sent, num_received, column)
        ids_N = exchange_rows(ids_S, num_sent, num_received, column)
        order_M = experts_N.argsort(stable=True)
        places_N1 = torch.empty_like(order_M)
        places_N1[order_M] = torch.arange(len(order_M), device=order_M.device)
        rows = self._rows(order_M, places_N1[:, None], experts_N[order_M], ids_N[order_M])
        y_NH = self.experts(x_NH, gates_N[order_M], rows)
        return exchange_rows(y_NH, num_received, num_sent, column)

    def _rows(self, token_of_M: Tensor, places_TK: Tensor, experts_M: Tensor, ids_M: Tensor) -> ExpertRows:
        """`experts_M` are global and ascending."""
        experts = self.experts
        local_M = experts_M - self.per_process * self.mesh.ep.rank
        counts_E = torch.bincount(local_M, minlength=self.per_process)
        has_absent = len(token_of_M) < places_TK.numel()
        if experts.are_all_adapted or not experts.adapted:
            return ExpertRows(token_of_M, places_TK, has_absent, counts_E, None, counts_E, ids_M)
        adapted_G = torch.tensor(experts.adapted, device=local_M.device) - self.per_process * self.mesh.ep.rank
        is_adapted_E = torch.zeros_like(counts_E, dtype=torch.bool).index_fill_(0, adapted_G, True)
        rows_L = is_adapted_E[local_M].nonzero().squeeze(1)
        return ExpertRows(token_of_M, places_TK, has_absent, counts_E, rows_L, counts_E[adapted_G], ids_M, adapted_G)
