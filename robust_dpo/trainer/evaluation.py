"""Losses and metrics of an evaluation, from the log-probs of all of its groups together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.trainer_pt_utils import nested_concat

from robust_dpo.trainer.metrics import (
    GROUP_METRICS,
    group_metrics,
    known_means,
    logp_accuracies,
    robust_metrics,
)
from robust_dpo.window import BatchObjective, GroupTable

GroupsArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics by name, and a table of the groups: loss, calibration, GROUP_METRICS, LOGP_ACCURACIES."""

    metrics: dict[str, float]
    table: NDArray[np.float64]


def evaluate_groups(
    predictions: GroupsArray | Sequence[GroupsArray],
    like: GroupTable,
    objective: BatchObjective,
    *,
    reward_beta: float,
) -> EvaluationResult:
    """The objective over a whole data set as one batch, so that it does not depend on the batch size.

    Args:
        predictions: [G, K, C] tables of its groups, in one array or in several of different K.
        like: a table that says which columns are in use.
        objective: what is minimised in training.
        reward_beta: scale of the rewards.
    """
    if not isinstance(predictions, np.ndarray):
        first, *others = predictions
        for other in others:
            first = nested_concat(first, other)
        predictions = first
    table = like.of_tensor(torch.from_numpy(predictions))
    solution, aggregation = objective.solve(table, training=False), objective.robust
    columns = [group_metrics(table.groups, reward_beta), logp_accuracies(table.groups)]
    domains: dict[str, Tensor] = {}
    if table.labels is not None:
        domains = aggregation.domain_losses(solution.group_losses, table.calibration, table.labels)
    calibration = torch.ones_like(solution.group_losses) if table.calibration is None else table.calibration
    robust = solution.robust
    metrics: dict[str, Tensor] = {
        "loss": solution.value,
        **solution.terms,
        **domains,
        **known_means(dict(zip(GROUP_METRICS, columns[0].unbind(1), strict=True))),
        **robust_metrics(robust.weights.amax(), robust.ess, robust.parameter if aggregation.has_parameter else None),
    }
    own = torch.stack([solution.group_losses, calibration], dim=1)
    return EvaluationResult(
        {name: float(value) for name, value in metrics.items()}, torch.cat([own, *columns], dim=1).double().numpy()
    )
