"""A global batch that is one micro-batch on one rank: the operator solves it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from robust_dpo.window.weighting import Batch, Forward, MicroBatch, Weighed, WindowSolution


class InOne:
    """The route for windows of one micro-batch, for aggregations of any kind.

    Args:
        forward: runs a micro-batch.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._window: Sequence[MicroBatch] = ()

    def open(self, model: nn.Module, window: Sequence[MicroBatch]) -> list[Batch]:
        self._window = window
        return [micro.batch for micro in window]

    def run(self, model: nn.Module, batch: Batch, place: int) -> Weighed:
        output = self._forward(model, batch)
        solution = WindowSolution(
            value=output.loss.detach(),
            ess=output.ess,
            max_weight=output.weights.amax(),
            parameter=output.parameter,
            weights=output.weights,
        )
        return Weighed(output.loss, output, self._window[place].counts, solution)
