"""A global batch that is one micro-batch on one rank: the operator solves it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from robust_dpo.window.weighting import Batch, DomainLosses, Forward, MicroBatch, Weighed, WindowSolution


class InOne:
    """The route for windows of one micro-batch, for aggregations of any kind.

    Args:
        forward: runs a micro-batch.
        calibrated: whether the aggregation uses the calibration of the groups.
    """

    def __init__(self, forward: Forward, *, calibrated: bool) -> None:
        self._forward, self._calibrated = forward, calibrated
        self._window: Sequence[MicroBatch] = ()

    def open(self, model: nn.Module, window: Sequence[MicroBatch]) -> list[Batch]:
        self._window = window
        return [micro.batch for micro in window]

    def run(self, model: nn.Module, batch: Batch, place: int) -> Weighed:
        output = self._forward(model, batch)
        calibration, labels = batch["calibration"] if self._calibrated else None, batch.get("domain_labels")
        solution = WindowSolution(
            value=output.loss.detach(),
            ess=output.ess,
            max_weight=output.weights.amax(),
            parameter=output.parameter,
            weights=output.weights,
            domain_losses=None if labels is None else DomainLosses(output.group_losses, calibration, labels),
        )
        return Weighed(output.loss, output, self._window[place].counts, solution)
