"""Weights first, from a pass without gradients over the whole window; then training with weights that are known.

For aggregations whose weights are no softmax, and for engines that take gradients away at each micro-batch. Costs
another forward pass of the policy. Weights are those of the model without dropout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_dpo.ops.precision import exact_dtype
from robust_dpo.output import PreferenceOutput
from robust_dpo.robust import RobustObjective
from robust_dpo.window.weighting import Batch, Forward, Look, MicroBatch, Weighed, WindowSolution


class TwoPass:
    """The route for every objective.

    Args:
        objective: of the run.
        forward: runs a micro-batch.
        look: runs it for its losses alone.
        accelerator: of the run.
        calibrated: whether the objective uses the calibration of the groups.
    """

    def __init__(
        self,
        objective: RobustObjective,
        forward: Forward,
        look: Look,
        accelerator: Accelerator,
        *,
        calibrated: bool,
    ) -> None:
        self._objective, self._forward, self._look, self._accelerator = objective, forward, look, accelerator
        self._calibrated = calibrated
        self._window: Sequence[MicroBatch] = ()
        self._coefficients: list[Tensor] = []
        self._factor: Tensor | None = None
        self._solution: WindowSolution | None = None

    def open(self, model: nn.Module, window: Sequence[MicroBatch]) -> list[Batch]:
        self._window = window
        outputs = [self._look(model, each.batch) for each in window]
        table = self._table(window, outputs)
        everyone = self._accelerator.gather(self._accelerator.pad_across_processes(table, dim=1)[None])
        # Micro-batch before rank: the order in which the sampler dealt the groups, however they are cut.
        ordered = everyone.transpose(0, 1)
        real = ordered[..., 2] == 1
        losses, calibration = ordered[real][:, 0], ordered[real][:, 1]
        solution = self._objective.solve(losses, calibration if self._calibrated else None)
        spread = torch.zeros_like(ordered[..., :2])
        spread[real] = torch.stack([solution.coefficients, solution.weights], dim=1)
        coefficients, weights = spread[:, self._accelerator.process_index].unbind(-1)
        # Coefficients that are not numbers must reach the loss, which stops the step, not the check of the operator.
        usable = coefficients.isfinite().all()
        self._factor = torch.where(usable, float(self._accelerator.num_processes), float("nan"))
        sizes = [len(output.group_losses) for output in outputs]
        known = coefficients.where(usable, 0.0)
        self._coefficients = [row[:size] for row, size in zip(known, sizes, strict=True)]
        counted = [row[:size] for row, size, each in zip(weights, sizes, window, strict=True) if each.counts]
        self._solution = WindowSolution(
            value=solution.value,
            ess=solution.ess,
            max_weight=solution.weights.amax(),
            parameter=solution.parameter,
            weights=torch.cat([weights.new_empty(0), *counted]),
        )
        return [_with_reference(each.batch, output) for each, output in zip(window, outputs, strict=True)]

    def run(self, model: nn.Module, batch: Batch, place: int) -> Weighed:
        assert self._factor is not None
        output = self._forward(model, batch, self._coefficients[place])
        solution = self._solution if place == len(self._window) - 1 else None
        return Weighed(output.loss * self._factor.to(output.loss), output, self._window[place].counts, solution)

    def _table(self, window: Sequence[MicroBatch], outputs: Sequence[PreferenceOutput]) -> Tensor:
        """[n, B, 3] exact dtype: loss, h, and 1 where there is a group that counts; 0 where there is none."""
        widest = max(len(output.group_losses) for output in outputs)
        device = outputs[0].group_losses.device
        table = torch.zeros(len(window), widest, 3, dtype=exact_dtype(device), device=device)
        for row, each, output in zip(table, window, outputs, strict=True):
            if each.counts:
                size = len(output.group_losses)
                row[:size, 0] = output.group_losses
                row[:size, 1] = each.batch["calibration"] if self._calibrated else 1.0
                row[:size, 2] = 1.0
        return table


def _with_reference(batch: Batch, output: PreferenceOutput) -> Batch:
    """The batch with the reference's log-probs, so that they are not computed again."""
    return batch if output.ref_logps is None else {**batch, "ref_logps": output.ref_logps}
