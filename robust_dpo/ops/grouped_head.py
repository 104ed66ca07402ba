"""Single-pass grouped accumulation: the loop over chunks behind `linear_preference_loss` (docs/objectives.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robust_dpo.dispatch import get_rescale
from robust_dpo.kernels.group_epilogue import EpilogueVectors
from robust_dpo.kernels.row_logprob import RowLogprob
from robust_dpo.ops.batch_layout import BatchLayout
from robust_dpo.ops.choose_head import choose_head
from robust_dpo.ops.chunking import ChunkRows
from robust_dpo.ops.epilogue import Epilogue, choose_epilogue
from robust_dpo.ops.head import HeadGradients, HeadWeights
from robust_dpo.ops.objective import Objective
from robust_dpo.ops.precision import exact_dtype
from robust_dpo.ops.rows import Chunk, ResponseRows, cut_groups
from robust_dpo.robust import ExponentialTilt


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
        grad_hidden: shaped like the hidden states; the true gradient is `grad_factor · hidden_factors` times this.
        grad_weight: [V, H]; the true gradient is `grad_factor` times this, as of the next.
        grad_bias: [V].
        grad_factor: [] what the gradients still have to be multiplied by, known only at the end of the pass.
        hidden_factors: [B, T] or [N].
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
    hidden_factors: Tensor


@dataclass(frozen=True)
class Reference:
    """A live reference: its head, and hidden states with the leading dimensions of the policy's."""

    head: HeadWeights
    hidden: Tensor


class GroupedHead:
    """One batch on its way through the head: policy and reference rows, groups, and what they weigh.

    Args:
        head: of the policy, in the dtype of the matrix products.
        hidden: [B, T, H] or [N, H].
        layout: of its rows and groups.
        reference: live, cached as log-probs [S], or None.
        scores: [S] or None.
        rows: of a chunk.
        backend: of the head.
        tile_dtype: of the logits.
    """

    def __init__(
        self,
        head: HeadWeights,
        hidden: Tensor,
        layout: BatchLayout,
        reference: Reference | Tensor | None,
        scores: Tensor | None,
        *,
        rows: ChunkRows,
        backend: str,
        tile_dtype: torch.dtype | None,
    ) -> None:
        self._head, self._hidden, self._layout = head, hidden, layout
        self._reference = reference if isinstance(reference, Reference) else None
        self._backend, self._tile_dtype = backend, tile_dtype or head.weight.dtype
        self._chunks = cut_groups(layout.rows, layout.sizes, rows)
        largest = max((stop - start for chunk in self._chunks for start, stop in chunk.pieces), default=1)
        self._engine = choose_head(head.weight, max(1, largest), backend=backend, tile_dtype=tile_dtype)
        self._vectors = _allocate_vectors(layout, reference, scores, head.accumulation_dtype)

    @property
    def _rows(self) -> ResponseRows:
        return self._layout.rows

    def solve(
        self, objective: Objective, log_normalizer: Tensor | None, hidden: bool, weight: bool, bias: bool
    ) -> GroupedResult:
        """Loss and vectors, and the gradients that are wanted."""
        gradients = self._engine.allocate(self._head, self._rows.count, hidden, weight, bias)
        tilt, v = objective.tilt, self._vectors
        epilogue = choose_epilogue(
            objective, v, self._rows, self._layout.groups, backend=self._backend, dtype=self._tile_dtype
        )
        factor = v.logps.new_ones(())
        if gradients.wanted and tilt is not None:
            if math.isinf(tilt.temperature) and log_normalizer is None:
                self._normalize_equal_weights()
            shift = self._accumulate(epilogue, tilt, gradients)
            solution = objective.solve(v.losses, v.calibration, log_normalizer)
            normalizer = solution.log_partition if log_normalizer is None else log_normalizer
            factor = (shift - normalizer).exp().to(factor.dtype)
        else:
            for chunk in self._chunks:
                self._log_probs(chunk, keep=False)
            pull_back = epilogue.whole_batch()
            solution = objective.solve(v.losses, v.calibration, log_normalizer)
            if gradients.wanted:
                per_response = pull_back(solution.coefficients)
                coefficients = self._rows.coefficients(per_response, None, v.logps.dtype)
                for chunk in self._chunks:
                    self._second_look(chunk, coefficients, gradients)
        self._engine.release()
        none = v.logps.new_empty
        shape = self._hidden.shape
        return GroupedResult(
            loss=solution.value,
            logps=v.logps,
            ref_logps=none(0) if v.ref_logps is None else v.ref_logps.clone(),
            group_losses=v.losses,
            weights=solution.weights,
            parameter=solution.parameter,
            log_partition=solution.log_partition,
            grad_hidden=none(0) if gradients.hidden is None else self._rows.spread(gradients.hidden, shape),
            grad_weight=none(0) if gradients.weight is None else gradients.weight,
            grad_bias=none(0) if gradients.bias is None else gradients.bias,
            grad_factor=factor,
            hidden_factors=none(0)
            if gradients.hidden_factors is None
            else self._rows.spread(gradients.hidden_factors, shape[:-1]),
        )

    def _normalize_equal_weights(self) -> None:
        """Where all scores are 0 their sum is known before the first chunk: no factor is left for the gradients."""
        assert self._vectors.state is not None
        self._vectors.state[0] = math.log(len(self._vectors.losses))

    def _accumulate(self, epilogue: Epilogue, tilt: ExponentialTilt, gradients: HeadGradients) -> Tensor:
        """One pass over the chunks with weights e^{s − shift}, since Σ e^s is known only at its end.

        Returns:
            [] the shift that the accumulated gradients were weighted with.
        """
        v, device = self._vectors, self._hidden.device
        assert v.coefficients is not None and v.state is not None
        rescale = get_rescale(self._backend, device, self._tile_dtype)
        shift, _, growth = v.state.unbind()
        for chunk in self._chunks:
            kept = self._log_probs(chunk, keep=len(chunk.pieces) == 1)
            epilogue.accumulate(chunk, tilt)
            if chunk.groups[0] > 0 and not math.isinf(tilt.temperature):
                gradients.rescale(growth, rescale)
            if kept is None:
                self._second_look(chunk, v.coefficients, gradients)
            else:
                self._backward(chunk.pieces[0], kept, v.coefficients, gradients)
        return shift

    def _log_probs(self, chunk: Chunk, *, keep: bool) -> RowLogprob | None:
        """Fill in the token log-probs of a chunk; with `keep`, its only piece is left ready for the gradients."""
        result, v = None, self._vectors
        for start, stop in chunk.pieces:
            if self._reference is not None and v.ref_token_logps is not None:
                head, hidden = self._reference.head, self._reference.hidden
                result = self._engine.forward(head, self._x(hidden, start, stop), self._t(start, stop), keep=False)
                v.ref_token_logps[start:stop] = result.logp
            x = self._x(self._hidden, start, stop)
            result = self._engine.forward(self._head, x, self._t(start, stop), keep=keep)
            v.token_logps[start:stop] = result.logp
        return result if keep else None

    def _second_look(self, chunk: Chunk, coefficients: Tensor, gradients: HeadGradients) -> None:
        """Gradients of a chunk whose coefficients were not known at the first look."""
        for start, stop in chunk.pieces:
            x = self._x(self._hidden, start, stop)
            kept = self._engine.forward(self._head, x, self._t(start, stop), keep=True)
            self._backward((start, stop), kept, coefficients, gradients)

    def _backward(
        self, piece: tuple[int, int], kept: RowLogprob, coefficients: Tensor, gradients: HeadGradients
    ) -> None:
        """Gradients of the rows of a piece; `coefficients` [N] are the factors of softmax − onehot."""
        start, stop = piece
        x, targets = self._x(self._hidden, start, stop), self._t(start, stop)
        self._engine.backward(self._head, x, targets, kept, coefficients[start:stop], gradients, start)

    def _x(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        return self._rows.gather(hidden, start, stop).to(self._head.weight.dtype)

    def _t(self, start: int, stop: int) -> Tensor:
        return self._rows.targets[start:stop]


def _allocate_vectors(
    layout: BatchLayout, reference: Reference | Tensor | None, scores: Tensor | None, dtype: torch.dtype
) -> EpilogueVectors:
    rows, groups, device = layout.rows, len(layout.sizes), layout.rows.targets.device

    def empty(count: int) -> Tensor:
        return torch.empty(count, dtype=dtype, device=device)

    responses = len(rows.lengths)
    state = torch.zeros(3, dtype=exact_dtype(device), device=device)
    state[0] = float("-inf")
    cached = reference.to(dtype) if isinstance(reference, Tensor) else None
    live = isinstance(reference, Reference)
    return EpilogueVectors(
        token_logps=empty(rows.count),
        ref_token_logps=empty(rows.count) if live else None,
        counted=rows.counted,
        seq_offsets=rows.seq_offsets,
        group_offsets=layout.group_offsets,
        lengths=rows.lengths.to(dtype).clamp(min=1),
        scores=scores,
        calibration=layout.calibration,
        logps=empty(responses),
        ref_logps=empty(responses) if live else cached,
        losses=empty(groups),
        derivative=empty(responses),
        coefficients=empty(rows.count),
        state=state,
        widest=max(layout.sizes),
    )
