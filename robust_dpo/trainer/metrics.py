"""Training metrics under TRL's names, kept on the device until they are logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from robust_dpo.groups import GroupLayout, Groups
from robust_dpo.trainer.scoring import Batch, response_lengths

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


def seen_groups(batch: Batch, layout: GroupLayout, logps: Tensor, ref_logps: Tensor | None) -> Groups:
    """The responses [S] of a collated batch, by groups, with their detached log-probs."""
    optional = {
        name: None if values is None else layout.pad(values)
        for name, values in (("ref_logps", ref_logps), ("scores", batch.get("scores")))
    }
    lengths = layout.pad(response_lengths(batch).to(logps.dtype), fill=1.0)
    return Groups(layout.pad(logps), lengths, layout.mask, **optional)


def group_metrics(groups: Groups, beta: float) -> Tensor:
    """[G, 6] float, one column per name in GROUP_METRICS.

    The chosen response is the best ranked one, "rejected" is the mean over the others; for pairs these are TRL's
    definitions. The reward of a response is β · log-ratio, or β · log-prob per token where there is no reference.
    The accuracy of a group is the share of the other responses that have a lower reward than the chosen one. What needs
    others is NaN for a group of one response.
    """
    rewards = beta * (groups.mean_logps if groups.ref_logps is None else groups.log_ratios)
    ranked = _Ranked.of(groups)
    chosen, rejected = ranked.best(rewards), ranked.mean_of_others(rewards)
    columns = [
        chosen,
        rejected,
        ranked.accuracy(rewards),
        chosen - rejected,
        ranked.best(groups.logps),
        ranked.mean_of_others(groups.logps),
    ]
    return torch.stack(columns, dim=1)


def logp_accuracies(groups: Groups) -> Tensor:
    """[G, 2] float, one column per name in LOGP_ACCURACIES.

    The accuracy of a group as in `group_metrics`, by log-prob and by log-prob per token instead of by reward; NaN for
    a group of one response.
    """
    ranked = _Ranked.of(groups)
    return torch.stack([ranked.accuracy(groups.logps), ranked.accuracy(groups.mean_logps)], dim=1)


def known_means(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means of the numbers in each tensor that are not NaN; without those that hold no such number."""
    return {name: value.nanmean() for name, value in values.items() if not value.isnan().all()}


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype to sum metrics in: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class _Ranked:
    """The best ranked response of each group against the others.

    Args:
        first: [G, 1] int64, its place.
        others: [G, K] bool, True at the others.
    """

    first: Tensor
    others: Tensor

    @staticmethod
    def of(groups: Groups) -> _Ranked:
        first = groups.order[:, :1]
        return _Ranked(first, groups.mask.scatter(1, first, False))

    def best(self, values: Tensor) -> Tensor:
        """[G] the value of the best, of values [G, K]."""
        return values.gather(1, self.first).squeeze(1)

    def mean_of_others(self, values: Tensor) -> Tensor:
        """[G] the mean of the others' values, NaN where there are none."""
        return values.masked_fill(~self.others, 0).sum(1) / self.others.sum(1)

    def accuracy(self, values: Tensor) -> Tensor:
        """[G] the share of the others whose value is below that of the best."""
        return self.mean_of_others((self.best(values)[:, None] > values).to(values.dtype))


def robust_metrics(max_weight: Tensor, ess: Tensor, parameter: Tensor | None) -> dict[str, Tensor]:
    """Largest weight, effective sample size and λ in force, by their names; all [].

    `parameter` is None where there is none to tell of: that of the mean is infinite, and JSON has no infinity.
    """
    metrics = {"robust/ess": ess, "robust/max_weight": max_weight}
    return metrics if parameter is None else {**metrics, "robust/lambda": parameter}


@dataclass
class RunningMeans:
    """Means of device tensors; nothing is read back before `pop`."""

    _totals: dict[tuple[str, ...], Tensor] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count every number that is not NaN. The tensors are all of one shape, [] or [G]."""
        table = torch.stack([value.detach() for value in values.values()])
        table = table.to(widest_float(table.device)).reshape(len(values), -1)
        counted = ~table.isnan()
        totals = torch.stack([table.where(counted, 0).sum(1), counted.sum(1)])
        names = tuple(values)
        self._totals[names] = totals if names not in self._totals else self._totals[names] + totals

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks since the last call, where anything was counted. One reduction, one read."""
        if not self._totals:
            return {}
        names = [name for group in self._totals for name in group]
        totals = torch.cat([*self._totals.values()], dim=1)
        self._totals = {}
        sums, counts = accelerator.reduce(totals, reduction="sum").tolist()
        return {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
