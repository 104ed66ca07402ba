"""Each micro-batch by itself, as in published code: no weight knows of another micro-batch or rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from robust_dpo.output import PreferenceOutput
from robust_dpo.window.weighting import Batch, Forward, MicroBatch, Weighed, WindowSolution


class Alone:
    """The mean over micro-batches and ranks of their own objectives. Depends on how the batch is cut.

    Args:
        forward: runs a micro-batch.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._window: Sequence[MicroBatch] = ()
        self._outputs: list[PreferenceOutput] = []

    def open(self, model: nn.Module, window: Sequence[MicroBatch]) -> list[Batch]:
        self._window, self._outputs = window, []
        return [micro.batch for micro in window]

    def run(self, model: nn.Module, batch: Batch, place: int) -> Weighed:
        output = self._forward(model, batch)
        counts = self._window[place].counts
        if counts:
            self._outputs.append(output)
        loss = output.loss * (counts / len(self._window))
        ends = place == len(self._window) - 1 and len(self._outputs) > 0
        return Weighed(loss, output, counts, self._solution() if ends else None)

    def _solution(self) -> WindowSolution:
        """Means over the micro-batches of this rank; weights of sum 1 over each."""
        outputs = self._outputs
        return WindowSolution(
            value=torch.stack([output.loss.detach() for output in outputs]).mean(),
            ess=torch.stack([output.ess for output in outputs]).mean(),
            max_weight=torch.stack([output.weights.amax() for output in outputs]).mean(),
            parameter=torch.stack([output.parameter for output in outputs]).mean(),
            weights=torch.cat([output.weights for output in outputs]),
        )
