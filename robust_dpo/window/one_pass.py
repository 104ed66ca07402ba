"""Gradients first, the normaliser afterwards: exact weights of softmax form without a second forward pass.

A micro-batch i on its own gives weights e^s / Z_i and the gradient ∇L_i of its own objective. With Z = Σ Z_i over all
micro-batches and ranks, the gradient of the global batch is Σ (Z_i / Z) ∇L_i. Z is known when the last micro-batch has
been run forward and not yet backward: until then losses are multiplied by e^{log Z_i − c}, c a shift of this rank, and
at the last one what has accumulated is multiplied by e^{c − log Z}, once. So all that reduces gradients over ranks,
measures or clips them sees final numbers, and with one micro-batch nothing is multiplied but its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_dpo.output import PreferenceOutput
from robust_dpo.robust import ExponentialTilt
from robust_dpo.window.gradients import accumulated, room_to_grow, scale, scale_where_needed
from robust_dpo.window.weighting import Batch, Forward, MicroBatch, Weighed, WindowSolution


class OnePass:
    """The route for objectives of softmax form.

    Args:
        objective: of the run.
        forward: runs a micro-batch.
        accelerator: of the run.
    """

    def __init__(self, objective: ExponentialTilt, forward: Forward, accelerator: Accelerator) -> None:
        self._objective, self._forward, self._accelerator = objective, forward, accelerator
        self._window: Sequence[MicroBatch] = ()
        self._parts: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._shift: Tensor | None = None

    def open(self, model: nn.Module, window: Sequence[MicroBatch]) -> list[Batch]:
        self._window, self._parts, self._weights, self._shift = window, [], [], None
        return [micro.batch for micro in window]

    def run(self, model: nn.Module, batch: Batch, place: int) -> Weighed:
        output = self._forward(model, batch)
        counts = self._window[place].counts
        part = _summary(output, counts=counts)
        self._parts.append(part)
        if counts:
            self._weights.append(output.weights)
        log_partition = part[0]
        if place < len(self._window) - 1:
            shift = self._raised_shift(model, log_partition)
            return Weighed(output.loss * _exp(log_partition - shift, output.loss), output, counts, None)
        table = self._accelerator.gather(torch.stack(self._parts))
        normalizer = table[:, 0].logsumexp(0)
        ranks = self._accelerator.num_processes
        if self._shift is not None:
            scale(accumulated(model), (self._shift - normalizer).exp() * ranks)
        factor = ranks * _exp(log_partition - normalizer, output.loss)
        return Weighed(output.loss * factor, output, counts, self._solution(table, normalizer, output.parameter))

    def _raised_shift(self, model: nn.Module, log_partition: Tensor) -> Tensor:
        """[] the shift for the next part, raised, with what has accumulated, where its factor would overflow."""
        if self._shift is None:
            self._shift = log_partition
            return log_partition
        gradients = accumulated(model)
        raised = torch.where(log_partition - self._shift > room_to_grow(gradients), log_partition, self._shift)
        scale_where_needed(gradients, (self._shift - raised).exp())
        self._shift = raised
        return raised

    def _solution(self, table: Tensor, normalizer: Tensor, parameter: Tensor) -> WindowSolution:
        log_partitions, counts, values, squares, largest = table.unbind(1)
        shares = (log_partitions - normalizer).exp()
        own = (torch.stack(self._parts)[:, 0] - normalizer).exp()
        weights = [share * each for share, each in zip(self._shares_that_count(own), self._weights, strict=True)]
        return WindowSolution(
            value=self._objective.value_of_parts(values, counts),
            ess=1 / (shares.square() * squares).sum(),
            max_weight=(shares * largest).amax(),
            parameter=parameter,
            weights=torch.cat([table.new_empty(0), *weights]),
        )

    def _shares_that_count(self, shares: Tensor) -> list[Tensor]:
        return [share for share, micro in zip(shares.unbind(), self._window, strict=True) if micro.counts]


def _summary(output: PreferenceOutput, *, counts: bool) -> Tensor:
    """[5] all that the objective of a larger batch needs of a part: log Z, groups, value, Σq², largest q.

    Of one that does not count: no groups, and log 0.
    """
    exact = output.log_partition.dtype
    groups = output.log_partition.new_tensor(float(len(output.weights)) if counts else 0.0)
    log_partition = output.log_partition if counts else torch.full_like(output.log_partition, float("-inf"))
    rest = (output.loss.detach(), output.weights.square().sum(), output.weights.amax())
    return torch.stack([log_partition, groups, *(value.to(exact) for value in rest)])


def _exp(exponent: Tensor, like: Tensor) -> Any:
    return exponent.exp().to(like.dtype)
