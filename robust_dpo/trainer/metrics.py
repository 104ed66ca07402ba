"""Training metrics under TRL's names, kept on the device until they are logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from robust_dpo.groups import Groups

# Columns of `group_metrics`, in order.
GROUP_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
# Columns of `logp_accuracies`, in order.
LOGP_ACCURACIES = ("logp_accuracy", "token_logp_accuracy")


def group_metrics(groups: Groups, beta: float) -> Tensor:
    """[G, 6] float, one column per name in GROUP_METRICS.

    The chosen response is the best ranked one, "rejected" is the mean over the others; for pairs these are TRL's
    definitions. The reward of a response is β · log-ratio, or β · log-prob per token where there is no reference.
    The accuracy of a group is the share of the other responses that have a lower reward than the chosen one.
    """
    rewards = beta * (groups.mean_logps if groups.ref_logps is None else groups.log_ratios)
    reward_chosen, reward_rejected = _chosen_and_rejected(groups, rewards)
    columns = [
        reward_chosen,
        reward_rejected,
        _accuracy(groups, rewards),
        reward_chosen - reward_rejected,
        *_chosen_and_rejected(groups, groups.logps),
    ]
    return torch.stack(columns, dim=1)


def logp_accuracies(groups: Groups) -> Tensor:
    """[G, 2] float, one column per name in LOGP_ACCURACIES.

    The accuracy of a group as in `group_metrics`, by log-prob and by log-prob per token instead of by reward.
    """
    return torch.stack([_accuracy(groups, groups.logps), _accuracy(groups, groups.mean_logps)], dim=1)


def _chosen_and_rejected(groups: Groups, values: Tensor) -> tuple[Tensor, Tensor]:
    """[G] the value of the best ranked response, and [G] the mean over the others, of values [G, K]."""
    best = groups.order[:, :1]
    others = groups.mask.scatter(1, best, False)
    return values.gather(1, best).squeeze(1), values.masked_fill(~others, 0).sum(1) / others.sum(1)


def _accuracy(groups: Groups, values: Tensor) -> Tensor:
    """[G] the share of the other responses whose value is below that of the best ranked one."""
    chosen, _ = _chosen_and_rejected(groups, values)
    return _chosen_and_rejected(groups, (chosen[:, None] > values).to(values.dtype))[1]


def robust_metrics(weights: Tensor, ess: Tensor, parameter: Tensor | None) -> dict[str, Tensor]:
    """Effective sample size, largest weight and λ in force, from the weights [G] of one normalisation.

    `parameter` is None for the mean, whose λ is infinite: JSON has no infinity.
    """
    metrics = {"robust/ess": ess, "robust/max_weight": weights.amax()}
    return metrics if parameter is None else {**metrics, "robust/lambda": parameter}


@dataclass
class RunningMeans:
    """Weighted means of device scalars; nothing is read back before `pop`."""

    _sums: dict[str, Tensor] = field(default_factory=dict)
    _weights: dict[str, float] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Count every value (0-dimensional tensors) `weight` times."""
        for name, value in values.items():
            term = value.detach().double() * weight
            self._sums[name] = term if name not in self._sums else self._sums[name] + term
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks since the last call. One reduction and one read, on every rank."""
        if not self._sums:
            return {}
        names = list(self._sums)
        totals = torch.stack([*self._sums.values()])
        weights = totals.new_tensor([self._weights[name] for name in names])
        self._sums, self._weights = {}, {}
        totals, weights = accelerator.reduce(torch.stack([totals, weights]), reduction="sum")
        return dict(zip(names, (totals / weights).tolist(), strict=True))
