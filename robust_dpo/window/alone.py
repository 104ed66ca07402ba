"""Each micro-batch by itself, as in published code: no weight knows of another micro-batch or rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
        self._outputs.append(output)
        counts = self._window[place].counts
        loss = output.loss * (counts / len(self._window))
        return Weighed(loss, output, counts, self._solution() if place == len(self._window) - 1 else None)

    def _solution(self) -> WindowSolution:
        """Means over the micro-batches of this rank, NaN if none counts; weights of sum 1 over each."""
        outputs = [output for output, micro in zip(self._outputs, self._window, strict=True) if micro.counts]

        def mean(values: list[Tensor]) -> Tensor:
            return torch.stack(values).mean() if values else self._outputs[0].loss.new_full((), float("nan"))

        return WindowSolution(
            value=mean([output.loss.detach() for output in outputs]),
            ess=mean([output.ess for output in outputs]),
            max_weight=mean([output.weights.amax() for output in outputs]),
            parameter=mean([output.parameter for output in outputs]),
            weights=torch.cat([self._outputs[0].weights[:0], *(output.weights for output in outputs)]),
        )
