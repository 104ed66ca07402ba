"""Between the two halves of a chunk: from token log-probs to the coefficients of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robust_dpo.dispatch import get_group_epilogue
from robust_dpo.groups import GroupLayout
from robust_dpo.kernels.group_epilogue import HEADROOM, EpilogueVectors, GroupEpilogueLauncher, NativeLoss
from robust_dpo.ops.objective import Objective, PullBack, Responses, group_epilogue
from robust_dpo.ops.precision import exact_dtype
from robust_dpo.ops.rows import Chunk, ResponseRows
from robust_dpo.robust import ExponentialTilt


class Epilogue(Protocol):
    """Fills in `EpilogueVectors`; see `GroupEpilogueLauncher`."""

    def accumulate(self, chunk: Chunk, tilt: ExponentialTilt) -> None:
        """Fill in the entries of a chunk's groups, and the state with them."""
        ...

    def whole_batch(self) -> PullBack:
        """Fill in log-probs and losses of all groups; what takes coefficients of the losses back to the responses."""
        ...


def choose_epilogue(
    objective: Objective,
    vectors: EpilogueVectors,
    rows: ResponseRows,
    layout: GroupLayout,
    *,
    backend: str,
    dtype: torch.dtype,
) -> Epilogue:
    """One launch for a built-in loss where the backend of tiles of `dtype` has it, otherwise autograd.

    A loss that couples groups is left to autograd: what a kernel knows of a derivative is that of a group's own loss.
    """
    device = vectors.token_logps.device
    objective.loss.check_given(reference=vectors.ref_logps is not None, scores=vectors.scores is not None)
    # A kernel compares scores in fp32, where those that differ in float64 may be ties.
    exact_scores = vectors.scores is not None and vectors.scores.dtype == torch.float64
    launcher = get_group_epilogue(backend, device, dtype, objective.loss, vectors.widest)
    unfit = objective.loss.couples_groups or exact_scores or vectors.token_logps.dtype != torch.float32
    if launcher is None or unfit:
        return AutogradEpilogue(objective, vectors, rows, layout)
    return NativeEpilogue(launcher, vectors, NativeLoss(objective.loss.name, dict(objective.loss.arguments)), layout)


@dataclass(frozen=True)
class NativeEpilogue:
    """All of it in one kernel."""

    launcher: GroupEpilogueLauncher
    vectors: EpilogueVectors
    loss: NativeLoss
    layout: GroupLayout

    def accumulate(self, chunk: Chunk, tilt: ExponentialTilt) -> None:
        self.launcher(self.vectors, self.loss, tilt.temperature, *chunk.groups)

    def whole_batch(self) -> PullBack:
        self.launcher(self.vectors, self.loss, None, 0, self.layout.num_groups)
        return lambda coefficients: coefficients[self.layout.group_of] * self.vectors.derivative


@dataclass(frozen=True)
class AutogradEpilogue:
    """The same in PyTorch, for every differentiable loss; no number is read on the host."""

    objective: Objective
    vectors: EpilogueVectors
    rows: ResponseRows
    layout: GroupLayout

    def accumulate(self, chunk: Chunk, tilt: ExponentialTilt) -> None:
        v, groups, sequences = self.vectors, slice(*chunk.groups), slice(*chunk.sequences)
        assert v.state is not None and v.coefficients is not None
        pull_back = self._solve(chunk.groups, chunk.sequences)
        calibration = None if v.calibration is None else v.calibration[groups]
        losses = v.losses[groups].to(exact_dtype(v.losses.device))
        scores = tilt.tilt(losses, None if calibration is None else calibration.to(losses.dtype))
        weights = _accumulate(v.state, scores).to(v.losses.dtype) * tilt.factor(calibration, v.losses[groups])
        rows = self._rows(chunk.sequences)
        per_row = -pull_back(weights)[self.rows.sequence[rows] - sequences.start]
        v.coefficients[rows] = per_row if v.counted is None else per_row.masked_fill(~v.counted[rows], 0.0)

    def whole_batch(self) -> PullBack:
        return self._solve((0, self.layout.num_groups), (0, len(self.vectors.logps)))

    def _solve(self, groups: tuple[int, int], sequences: tuple[int, int]) -> PullBack:
        v, rows, select = self.vectors, self._rows(sequences), slice(*sequences)
        v.logps[select] = self.rows.sequence_sums(v.token_logps[rows], *sequences)
        if v.ref_token_logps is not None and v.ref_logps is not None:
            v.ref_logps[select] = self.rows.sequence_sums(v.ref_token_logps[rows], *sequences)
        responses = Responses(v.logps, v.lengths, v.ref_logps, v.scores).part(select)
        layout = self.layout.part(*groups, *sequences)
        v.losses[slice(*groups)], pull_back = group_epilogue(self.objective, responses, layout)
        return pull_back

    def _rows(self, sequences: tuple[int, int]) -> slice:
        first, last = sequences
        return slice(self.rows.offsets[first], self.rows.offsets[last])


def _accumulate(state: Tensor, scores: Tensor) -> Tensor:
    """[G] e^{s − shift}, after a chunk's scores have moved the state (shift, Σ e^{s − shift}, rescale) on."""
    shift, total, _ = state.unbind()
    highest = scores.amax()
    first = shift == float("-inf")
    moved = torch.where(first | (highest > shift + HEADROOM), highest, shift)
    rescale = torch.where(first, 1.0, (shift - moved).exp())
    weights = (scores - moved).exp()
    state.copy_(torch.stack([moved, total * rescale + weights.sum(), rescale]))
    return weights
