"""Mixtures of experts: how the routers of a model spread tokens, and the loss that keeps experts evenly loaded.

The auxiliary loss of Switch Transformer (arXiv 2101.03961, eq. 4 to 6), as transformers computes it:

    aux = E · Σ_e f_e P_e,   f_e = chosen_e / tokens,   P_e = probability_e / tokens,

over E experts, all layers and all tokens together. How often an expert is chosen has no gradient, so aux is linear in
the probabilities: with its slope in each of them known, the tokens of a batch can be run in any number of parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.ops.precision import exact_dtype


@dataclass(frozen=True)
class ExpertLoad:
    """Sums over tokens and layers, which add up over groups, micro-batches and ranks.

    Args:
        chosen: [..., E] how many tokens were sent to each expert.
        probability: [..., E] sum of the probabilities that the routers gave it.
        tokens: [...] how many tokens there were, each counted once per layer.
    """

    chosen: Tensor
    probability: Tensor
    tokens: Tensor

    @staticmethod
    def of_tensor(values: Tensor) -> ExpertLoad:
        """The load [...] of what `to_tensor` gave, [..., 2E + 1]."""
        experts = values.shape[-1] // 2
        chosen, probability, tokens = values.split((experts, experts, 1), dim=-1)
        return ExpertLoad(chosen, probability, tokens.squeeze(-1))

    def to_tensor(self) -> Tensor:
        """[..., 2E + 1], which ranks can exchange and add up."""
        return torch.cat([self.chosen, self.probability, self.tokens.unsqueeze(-1)], dim=-1)

    def total(self) -> ExpertLoad:
        """The load [] of all groups [G] together."""
        return ExpertLoad(self.chosen.sum(0), self.probability.sum(0), self.tokens.sum())


def load_balancing_loss(load: ExpertLoad) -> Tensor:
    """[] aux of the load [] of a whole batch: top_k where it is even, up to E. NaN where there was no token."""
    return (load_slopes(load) * load.probability).sum()


def load_slopes(load: ExpertLoad) -> Tensor:
    """[E] ∂aux/∂probability of the load [] of a whole batch."""
    return len(load.chosen) * load.chosen / load.tokens.square()


@dataclass(frozen=True)
class RouterPass:
    """What the routers of a model said in one forward pass.

    Args:
        logits: [N, E] of each layer that has a router, N the places that the layer was given.
        owners: [N] int64, the group of each place; any where its weight is 0.
        weights: [N] int64, how many tokens stand in each place: K for a token that K responses share, 0 for none.
        groups: of the batch.
        top_k: how many experts a token is sent to.
    """

    logits: tuple[Tensor, ...]
    owners: Tensor
    weights: Tensor
    groups: int
    top_k: int

    @torch.no_grad()
    def load(self) -> ExpertLoad:
        """The load [G] of each group, detached. Reads nothing from the device."""
        experts, device = self.logits[0].shape[-1], self.owners.device
        sums = torch.zeros(self.groups, 2 * experts, dtype=exact_dtype(device), device=device)
        for logits in self.logits:
            probabilities = _probabilities(logits)
            chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(self.top_k, dim=-1).indices, 1.0)
            each = torch.cat([chosen, probabilities], dim=1).to(sums.dtype)
            sums.index_add_(0, self.owners, self._counted(each, self.weights[:, None]))
        chosen, probability = sums.split(experts, dim=-1)
        return ExpertLoad(chosen, probability, chosen.sum(-1) / self.top_k)

    def weighted(self, slopes: Tensor) -> Tensor:
        """[] Σ_e slopes_e · (sum of the probabilities of expert e over the tokens), differentiable in the logits.

        Args:
            slopes: [E] `load_slopes` of the whole batch, times whatever aux is multiplied with. Then the values of all
                parts of the batch add up to aux, and the gradients to its gradient.
        """
        total = torch.zeros((), device=self.owners.device)
        for logits in self.logits:
            probabilities = _probabilities(logits)
            # No matrix product, which autocast would round.
            each = (probabilities * slopes.to(probabilities.dtype)).sum(-1)
            total = total + self._counted(each, self.weights).sum()
        return total

    @staticmethod
    def _counted(values: Tensor, weights: Tensor) -> Tensor:
        """Values times weights, and 0 where the weight is, whatever stands there."""
        return (values * weights).where(weights > 0, 0.0)


def _probabilities(logits: Tensor) -> Tensor:
    """[N, E] softmax in float32, as routers take it, or in float64 where the logits are."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
