"""Each micro-batch by itself, as in published code: no weight knows of another micro-batch or rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from robust_dpo.window.weighting import Batch, MicroBatch, Weighed, Weighting, WindowSolution


class Alone:
    """The mean over micro-batches and ranks of their own objectives. Depends on how the batch is cut.

    Args:
        route: for windows of one micro-batch on one rank.
    """

    def __init__(self, route: Weighting) -> None:
        self._route = route
        self._window: Sequence[MicroBatch] = ()
        self._solutions: list[WindowSolution] = []

    def open(self, model: nn.Module, window: Sequence[MicroBatch]) -> list[Batch]:
        self._window, self._solutions = window, []
        return [micro.batch for micro in window]

    def run(self, model: nn.Module, batch: Batch, place: int) -> Weighed:
        micro = self._window[place]
        (batch,) = self._route.open(model, [MicroBatch(batch, counts=True)])
        weighed = self._route.run(model, batch, 0)
        assert weighed.solution is not None
        if micro.counts:
            self._solutions.append(weighed.solution)
        loss = weighed.loss * (micro.counts / len(self._window))
        last = place == len(self._window) - 1
        return replace(weighed, loss=loss, counts=micro.counts, solution=self._mean(weighed.solution) if last else None)

    def _mean(self, like: WindowSolution) -> WindowSolution:
        """Means over the micro-batches of this rank, NaN if none counts; weights of sum 1 over each."""
        solutions = self._solutions

        def mean(values: list[Tensor]) -> Tensor:
            return torch.stack(values).mean() if values else torch.full_like(like.value, float("nan"))

        return WindowSolution(
            value=mean([solution.value for solution in solutions]),
            ess=mean([solution.ess for solution in solutions]),
            max_weight=mean([solution.max_weight for solution in solutions]),
            parameter=mean([solution.parameter for solution in solutions]),
            weights=torch.cat([like.weights[:0], *(solution.weights for solution in solutions)]),
            terms={name: mean([solution.terms[name] for solution in solutions]) for name in like.terms},
        )
