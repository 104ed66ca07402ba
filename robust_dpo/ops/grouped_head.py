"""Single-pass grouped accumulation: the loop over chunks behind `linear_preference_loss` (docs/objectives.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from robust_dpo.groups import GroupLayout
from robust_dpo.kernels.row_logprob import RowLogprob
from robust_dpo.ops import inputs
from robust_dpo.ops.choose_head import choose_head
from robust_dpo.ops.head import HeadGradients, HeadWeights, LinearHead
from robust_dpo.ops.objective import Objective, Responses, exact_dtype, group_epilogue
from robust_dpo.ops.rows import Chunk, ResponseRows, cut_groups
from robust_dpo.robust import ExponentialTilt

# Unnormalised weights e^{s − shift} may grow by e³⁰ before the accumulators are rescaled: far from the fp32 overflow at
# e⁸⁸, and rare enough that rescaling costs nothing.
_HEADROOM = 30.0


class GroupedResult(NamedTuple):
    """Tensors of one batch; what is not wanted or not there is empty.

    Args:
        loss: [].
        logps: [S].
        ref_logps: [S].
        group_losses: [G].
        weights: [G].
        parameter: [].
        log_partition: [].
        grad_hidden: shaped like the hidden states; the true gradient is `grad_factor` times this, as of the next two.
        grad_weight: [V, H].
        grad_bias: [V].
        grad_factor: [] what the gradients still have to be multiplied by, known only at the end of the pass.
    """

    loss: Tensor
    logps: Tensor
    ref_logps: Tensor
    group_losses: Tensor
    weights: Tensor
    parameter: Tensor
    log_partition: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    grad_factor: Tensor


@dataclass
class GroupedHead:
    """One batch on its way through the head: policy and reference rows, groups, and what they weigh.

    Args:
        head: of the policy, in the dtype of the matrix products.
        hidden: [B, T, H] or [N, H].
        targets: [B, T] or [N].
        seq_lens: [S] for packed rows.
        group_size: of equal groups, or None.
        group_sizes: [G] of ragged groups, or None.
        max_rows: of a chunk.
        backend: of the head.
        tile_dtype: of the logits.
    """

    head: HeadWeights
    hidden: Tensor
    targets: Tensor
    seq_lens: Tensor | None
    group_size: int | None
    group_sizes: Tensor | None
    max_rows: int
    backend: str
    tile_dtype: torch.dtype | None
    rows: ResponseRows = field(init=False)
    layout: GroupLayout = field(init=False)
    chunks: list[Chunk] = field(init=False)
    engine: LinearHead = field(init=False)
    logps: Tensor = field(init=False)
    ref_logps: Tensor | None = field(init=False, default=None)
    scores: Tensor | None = field(init=False, default=None)
    calibration: Tensor | None = field(init=False, default=None)
    _reference: tuple[HeadWeights, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        dtype, device = self.head.accumulation_dtype, self.hidden.device
        self.rows = ResponseRows.select(self.targets, self.seq_lens, self.head.weight.shape[0])
        responses = len(self.rows.lengths)
        self.layout = GroupLayout.build(responses, self.group_size or 1, self.group_sizes, device)
        sizes = self.layout.mask.sum(1).tolist()
        self.chunks = cut_groups(self.rows, sizes, self.max_rows)
        largest = max((stop - start for chunk in self.chunks for start, stop in chunk.pieces), default=1)
        self.engine = choose_head(self.head.weight, max(1, largest), backend=self.backend, tile_dtype=self.tile_dtype)
        self.logps = torch.zeros(responses, dtype=dtype, device=device)

    def set_reference(self, head: HeadWeights, hidden: Tensor) -> None:
        """A live reference, run chunk by chunk beside the policy."""
        self._reference = (head, hidden)
        self.ref_logps = torch.zeros_like(self.logps)

    def set_reference_logps(self, ref_logps: Tensor) -> None:
        """A cached reference [S]."""
        self.ref_logps = ref_logps.to(self.logps.dtype)

    def set_groups(self, calibration: Tensor | None, scores: Tensor | None) -> None:
        """Calibration per group or per response, and scores per response.

        Raises:
            ValueError: a calibration is negative or not finite, a score or a cached reference is not finite.
        """
        inputs.check_values(self.ref_logps, calibration, scores)
        self.calibration = inputs.group_calibration(calibration, self.layout, self.logps.dtype)
        self.scores = scores

    def solve(
        self, objective: Objective, log_normalizer: Tensor | None, hidden: bool, weight: bool, bias: bool
    ) -> GroupedResult:
        """Loss and vectors, and the gradients that are wanted."""
        gradients = HeadGradients.allocate(self.head, self.rows.count, hidden, weight, bias)
        robust = objective.robust
        factor = self.logps.new_ones(())
        if gradients.wanted and robust.single_pass and isinstance(robust, ExponentialTilt):
            group_losses, shift = self._accumulate(objective, robust, gradients)
            solution = objective.solve(group_losses, self.calibration, log_normalizer)
            normalizer = solution.log_partition if log_normalizer is None else log_normalizer
            factor = (shift - normalizer).exp().to(factor.dtype)
        else:
            for chunk in self.chunks:
                self._log_probs(chunk, keep=False)
            group_losses, derivative = group_epilogue(objective, self._responses(), self.layout)
            solution = objective.solve(group_losses, self.calibration, log_normalizer)
            if gradients.wanted:
                coefficients = solution.coefficients[self.layout.group_of] * derivative
                for chunk in self.chunks:
                    self._second_look(chunk, coefficients, gradients)
        none = self.logps.new_empty
        return GroupedResult(
            loss=solution.value,
            logps=self.logps,
            ref_logps=none(0) if self.ref_logps is None else self.ref_logps.clone(),
            group_losses=group_losses,
            weights=solution.weights,
            parameter=solution.parameter,
            log_partition=solution.log_partition,
            grad_hidden=none(0) if gradients.hidden is None else self.rows.spread(gradients.hidden, self.hidden.shape),
            grad_weight=none(0) if gradients.weight is None else gradients.weight,
            grad_bias=none(0) if gradients.bias is None else gradients.bias,
            grad_factor=factor,
        )

    def _accumulate(
        self, objective: Objective, tilt: ExponentialTilt, gradients: HeadGradients
    ) -> tuple[Tensor, Tensor]:
        """One pass over the chunks with weights e^{s − shift}, since Σ e^s is known only at its end.

        Returns:
            Group losses [G], and the shift [] that the accumulated gradients were weighted with.
        """
        group_losses = self.logps.new_empty(self.layout.num_groups)
        factors = tilt.factor(self.calibration, group_losses)
        exact = exact_dtype(group_losses.device)
        calibration = None if self.calibration is None else self.calibration.to(exact)
        shift: float | None = None
        for chunk in self.chunks:
            kept = self._log_probs(chunk, keep=len(chunk.pieces) == 1)
            groups, sequences = slice(*chunk.groups), slice(*chunk.sequences)
            layout = self.layout.part(*chunk.groups, *chunk.sequences)
            losses, derivative = group_epilogue(objective, self._responses().part(sequences), layout)
            group_losses[groups] = losses
            scores = tilt.tilt(losses.to(exact), None if calibration is None else calibration[groups])
            highest = float(scores.max())
            if shift is None:
                shift = highest
            elif highest > shift + _HEADROOM:
                gradients.scale_(math.exp(shift - highest))
                shift = highest
            weights = (scores - shift).exp().to(factors.dtype) * factors[groups]
            coefficients = torch.zeros_like(self.logps)
            coefficients[sequences] = weights[layout.group_of] * derivative
            if kept is None:
                self._second_look(chunk, coefficients, gradients)
            else:
                self._backward(chunk.pieces[0], kept, coefficients, gradients)
        return group_losses, self.logps.new_tensor(shift or 0.0, dtype=exact)

    def _responses(self) -> Responses:
        return Responses(self.logps, self.rows.lengths, self.ref_logps, self.scores)

    def _log_probs(self, chunk: Chunk, *, keep: bool) -> RowLogprob | None:
        """Fill in the log-probs of a chunk's responses; with `keep`, its only piece is left ready for the gradients."""
        result = None
        for start, stop in chunk.pieces:
            if self._reference is not None and self.ref_logps is not None:
                head, hidden = self._reference
                result = self.engine.forward(head, self._x(hidden, start, stop), self._t(start, stop), keep=False)
                self.rows.add_to_sequences(self.ref_logps, result.logp, start)
            x = self._x(self.hidden, start, stop)
            result = self.engine.forward(self.head, x, self._t(start, stop), keep=keep)
            self.rows.add_to_sequences(self.logps, result.logp, start)
        return result if keep else None

    def _second_look(self, chunk: Chunk, coefficients: Tensor, gradients: HeadGradients) -> None:
        """Gradients of a chunk whose coefficients were not known at the first look."""
        for start, stop in chunk.pieces:
            kept = self.engine.forward(self.head, self._x(self.hidden, start, stop), self._t(start, stop), keep=True)
            self._backward((start, stop), kept, coefficients, gradients)

    def _backward(
        self, piece: tuple[int, int], kept: RowLogprob, coefficients: Tensor, gradients: HeadGradients
    ) -> None:
        """Gradients of the rows of a piece, whose responses have ∂L/∂logp = `coefficients` [S]."""
        start, stop = piece
        x = self._x(self.hidden, start, stop)
        rows = -coefficients[self.rows.sequence[start:stop]]
        self.engine.backward(self.head, x, self._t(start, stop), kept, rows, gradients, start)

    def _x(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        return self.rows.gather(hidden, start, stop).to(self.head.weight.dtype)

    def _t(self, start: int, stop: int) -> Tensor:
        return self.rows.targets[start:stop]
