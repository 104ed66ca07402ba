"""The objective of a global batch as a function of its log-probs, and its slope in each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robust_dpo.expert_load import load_balancing_loss, load_slopes
from robust_dpo.groups import Groups
from robust_dpo.losses import BoundLoss
from robust_dpo.robust import RobustObjective, Solution
from robust_dpo.window.table import GroupTable


@dataclass(frozen=True)
class BatchSolution:
    """A solved batch; all detached.

    Args:
        value: [] what is minimised.
        robust: the aggregation of the group losses, which may be a part of it.
        group_losses: [G] ℓ.
        slopes: [G, K] ∂value/∂logp, 0 where there is no response.
        terms: [] each, what is added to the aggregation, by the name that it is logged under.
        load_slopes: [E] ∂value/∂(sum of the probabilities that the routers gave an expert), or None without routers.
    """

    value: Tensor
    robust: Solution
    group_losses: Tensor
    slopes: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    load_slopes: Tensor | None = None


@dataclass(frozen=True)
class BatchObjective:
    """What is minimised: the worst case over group losses, and terms beside it.

    Args:
        loss: of a group.
        robust: the aggregation.
        sft_weight: ≥ 0, times the negative log-likelihood of the best response of each group, a mean over their tokens:
            w · Σ_g −S_g / Σ_g |y_g|. It has no part in the worst case, and no calibration.
        router_coefficient: ≥ 0, times the loss that balances the load of experts over all tokens
            (`expert_load.load_balancing_loss`). Above 0 every table has a load.
    """

    loss: BoundLoss
    robust: RobustObjective
    sft_weight: float = 0.0
    router_coefficient: float = 0.0

    @property
    def adds_terms(self) -> bool:
        """Whether there is more to it than the aggregation."""
        return self.sft_weight > 0 or self.router_coefficient > 0

    def solve(self, table: GroupTable, *, training: bool = True) -> BatchSolution:
        """Value and slopes, by autograd on these few numbers: any differentiable loss of any groups will do.

        Args:
            table: the batch.
            training: whether it is that of an optimizer step, for aggregations with a state.
        """
        aggregation = self.robust if table.labels is None else self.robust.at(table.labels, training=training)
        with torch.enable_grad():
            logps = table.groups.logps.detach().requires_grad_()
            groups = replace(table.groups, logps=logps)
            losses = self.loss(groups)
            robust = aggregation.solve(losses, table.calibration)
            value, terms = robust.attach(losses), {}
            if self.sft_weight > 0:
                terms["nll_loss"] = best_nll(groups)
                value = value + self.sft_weight * terms["nll_loss"]
            slopes = torch.zeros_like(logps)
            if value.requires_grad:
                (slopes,) = torch.autograd.grad(value, logps, allow_unused=True, materialize_grads=True)
        balance = None
        if self.router_coefficient > 0:
            assert table.load is not None
            load = table.load.total()
            balance = self.router_coefficient * load_slopes(load)
            terms["aux_loss"] = load_balancing_loss(load)
            value = value + self.router_coefficient * terms["aux_loss"]
        known = {name: term.detach() for name, term in terms.items()}
        return BatchSolution(value.detach(), robust, losses.detach(), slopes, known, balance)


def best_nll(groups: Groups) -> Tensor:
    """[] negative log-likelihood per token of the best responses of all groups together, nats."""
    best = groups.order[:, :1]
    return -groups.logps.gather(1, best).sum() / groups.lengths.gather(1, best).sum()
