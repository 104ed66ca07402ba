"""A policy of one vector of parameters, whose log-probs are scalar products: windows without a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_dpo.groups import GroupLayout
from robust_dpo.ops import preference_loss
from robust_dpo.output import PreferenceOutput
from robust_dpo.robust import Mean, RobustObjective
from robust_dpo.window import AccumulationWindow, RoutePlan, make_weighting

Batch = dict[str, Any]
BETA = 0.1
FEATURES = 5


class Policy(nn.Module):
    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weights


def make_batch(sizes: list[int], spread: float = 1.0, dtype: torch.dtype = torch.float64, start: int = 0) -> Batch:
    """Groups of random responses, of `sizes`."""
    return {
        # The name of what every collated batch has; here [S, FEATURES].
        "input_ids": spread * torch.randn(sum(sizes), FEATURES, dtype=dtype),
        "group_sizes": torch.tensor(sizes),
        "calibration": 2 * torch.rand(len(sizes), dtype=dtype),
        "ids": [f"group-{start + index}" for index in range(len(sizes))],
    }


def cut(batch: Batch, counts: list[int]) -> list[Batch]:
    """The batch in consecutive parts of `counts` groups."""
    parts, first = [], 0
    for count in counts:
        last = first + count
        responses = slice(int(batch["group_sizes"][:first].sum()), int(batch["group_sizes"][:last].sum()))
        part = {name: batch[name][first:last] for name in ("group_sizes", "calibration", "ids")}
        parts.append({**part, "input_ids": batch["input_ids"][responses]})
        first = last
    return parts


def make_forward(objective: RobustObjective, *, calibrated: bool) -> Callable[..., PreferenceOutput]:
    def forward(model: nn.Module, batch: Batch, coefficients: Tensor | None = None) -> PreferenceOutput:
        robust, calibration = objective, batch["calibration"] if calibrated else None
        if coefficients is not None:
            robust, calibration = Mean(), coefficients * len(coefficients)
        logps = model(batch["input_ids"])
        return preference_loss(
            logps,
            torch.zeros_like(logps),
            group_sizes=batch["group_sizes"],
            beta=BETA,
            robust=robust,
            calibration=calibration,
        )

    return forward


def make_window(objective: RobustObjective, route: str, *, calibrated: bool = True) -> AccumulationWindow:
    accelerator = Accelerator(cpu=True)
    forward = make_forward(objective, calibrated=calibrated)

    def look(model: nn.Module, batch: Batch) -> PreferenceOutput:
        with torch.no_grad():
            return forward(model, batch, torch.ones(len(batch["group_sizes"]), dtype=batch["calibration"].dtype))

    weighting = make_weighting(RoutePlan(route), objective, forward, look, accelerator, calibrated=calibrated)
    return AccumulationWindow(weighting, accelerator, lambda batch: batch, drop_last=False)


def train_step(window: AccumulationWindow, model: nn.Module, batches: list[Batch], wanted: int | None = None) -> Any:
    """Accumulate the gradients of one optimizer step; what was weighed at its last micro-batch."""
    weighed = None
    for batch in window.open(model, batches, wanted or len(batches)):
        weighed = window.run(model, batch)
        weighed.loss.backward()
    return weighed


def whole(objective: RobustObjective, model: Policy, batch: Batch, *, calibrated: bool = True) -> tuple[Any, Tensor]:
    """The solution over all groups, in float64 by the plain formula, and its gradient."""
    weights = model.weights.detach().double().requires_grad_()
    logps = batch["input_ids"].double() @ weights
    layout = GroupLayout.build(len(logps), 1, batch["group_sizes"], logps.device)
    # Best first: the winner of every strictly ranked pair of a group, averaged over its pairs.
    padded = layout.pad(logps)
    losses = []
    for row, size in zip(padded, batch["group_sizes"].tolist(), strict=True):
        pairs = [-nn.functional.logsigmoid(BETA * (row[i] - row[j])) for i in range(size) for j in range(i + 1, size)]
        losses.append(torch.stack(pairs).mean() if pairs else row.sum() * 0)
    losses = torch.stack(losses)
    solution = objective.solve(losses, batch["calibration"].double() if calibrated else None)
    (gradient,) = torch.autograd.grad((solution.coefficients * losses).sum(), weights)
    return solution, gradient
