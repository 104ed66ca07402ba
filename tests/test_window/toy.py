"""A policy of one vector of parameters, whose log-probs are scalar products: windows without a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_dpo.groups import GroupLayout, Groups
from robust_dpo.losses import resolve
from robust_dpo.losses.linear import LINEAR
from robust_dpo.ops import preference_loss
from robust_dpo.output import PreferenceOutput
from robust_dpo.robust import RobustObjective
from robust_dpo.window import (
    AccumulationWindow,
    BatchObjective,
    GroupTable,
    RoutePlan,
    layout_of,
    make_weighting,
)

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


def make_forward(objective: BatchObjective, *, calibrated: bool) -> Callable[..., PreferenceOutput]:
    def forward(
        model: nn.Module, batch: Batch, slopes: Tensor | None = None, load_slopes: Tensor | None = None
    ) -> PreferenceOutput:
        assert load_slopes is None, "it has no routers"
        logps, sizes = model(batch["input_ids"]), batch["group_sizes"]
        ref_logps, calibration = torch.zeros_like(logps), batch["calibration"] if calibrated else None
        if slopes is not None:
            scores = slopes * len(sizes)
            return preference_loss(logps, ref_logps, group_sizes=sizes, loss=LINEAR, scores=scores)
        return preference_loss(
            *(logps, ref_logps),
            group_sizes=sizes,
            loss=objective.loss,
            robust=objective.robust,
            calibration=calibration,
        )

    return forward


def make_look(*, calibrated: bool) -> Callable[..., tuple[GroupTable, GroupLayout]]:
    def look(model: nn.Module, batch: Batch) -> tuple[GroupTable, GroupLayout]:
        logps = model(batch["input_ids"]).detach()
        layout = layout_of(batch["group_sizes"], logps.device)
        padded = layout.pad(logps)
        # Responses of different length.
        lengths = layout.pad(lengths_of(batch).to(logps.dtype), fill=1.0)
        groups = Groups(padded, lengths, layout.mask, torch.zeros_like(padded))
        return GroupTable(groups, batch["calibration"] if calibrated else None), layout

    return look


def lengths_of(batch: Batch) -> Tensor:
    """[S] made up of the features, so that a part of a batch has its own."""
    return 1 + (10 * batch["input_ids"][:, 0].abs()).floor()


def make_window(
    robust: RobustObjective,
    route: str,
    *,
    calibrated: bool = True,
    sft_weight: float = 0.0,
    keeps_gradients: bool = False,
) -> AccumulationWindow:
    accelerator = Accelerator(cpu=True)
    objective = BatchObjective(resolve("sigmoid", BETA), robust, sft_weight)
    forward, look = make_forward(objective, calibrated=calibrated), make_look(calibrated=calibrated)
    plan = RoutePlan(route)
    if route == "micro_batch":
        plan = RoutePlan("two_pass" if objective.adds_terms else "in_one", "micro_batch")
    weighting = make_weighting(plan, objective, forward, look, accelerator)
    return AccumulationWindow(
        weighting, accelerator, lambda batch: batch, drop_last=False, keeps_gradients=keeps_gradients
    )


def train_step(window: AccumulationWindow, model: nn.Module, batches: list[Batch], wanted: int | None = None) -> Any:
    """Accumulate the gradients of one optimizer step; what was weighed at its last micro-batch."""
    weighed = None
    for batch in window.open(model, batches, wanted or len(batches)):
        weighed = window.run(model, batch)
        weighed.loss.backward()
    return weighed


def whole(
    objective: RobustObjective, model: Policy, batch: Batch, *, calibrated: bool = True, sft_weight: float = 0.0
) -> tuple[Any, Tensor]:
    """The solution over all groups, in float64 by the plain formula, and the gradient of it and the SFT term."""
    weights = model.weights.detach().double().requires_grad_()
    logps = batch["input_ids"].double() @ weights
    # Best first: the winner of every strictly ranked pair of a group, averaged over its pairs.
    losses, best_logp, best_tokens = [], logps.new_zeros(()), 0.0
    start = 0
    for size in batch["group_sizes"].tolist():
        row = logps[start : start + size]
        pairs = [-nn.functional.logsigmoid(BETA * (row[i] - row[j])) for i in range(size) for j in range(i + 1, size)]
        losses.append(torch.stack(pairs).mean() if pairs else row.sum() * 0)
        best_logp, best_tokens = best_logp + row[0], best_tokens + float(lengths_of(batch)[start])
        start += size
    losses = torch.stack(losses)
    solution = objective.solve(losses, batch["calibration"].double() if calibrated else None)
    total = (solution.coefficients * losses).sum() - sft_weight * best_logp / best_tokens
    (gradient,) = torch.autograd.grad(total, weights)
    return solution, gradient
