"""Logits that exist already, on a device: one launch over all rows, nothing copied, nothing read on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.kernels.row_logprob import IGNORE_INDEX, RowLogprob
from robust_dpo.ops.logp_pass import Logps
from robust_dpo.ops.precision import exact_dtype


@dataclass(frozen=True)
class DenseRows:
    """Logits as one matrix of rows, of which those between two responses of a strided tensor belong to nobody.

    `logits[:, :-1]`, the usual shift of [B, T + 1, V], becomes B·(T + 1) − 1 rows; response b begins at b·period.

    Args:
        period: rows from the beginning of a response to that of the next one; T where nothing lies between them.
        targets: [M] int64, `IGNORE_INDEX` for rows of nobody.
        shape: of the targets, [B, T] or packed [N].
    """

    period: int
    targets: Tensor
    shape: torch.Size

    @staticmethod
    def of(logits: Tensor, targets: Tensor) -> DenseRows | None:
        """The rows, or None where they are no matrix with elements side by side."""
        if logits.stride(-1) != 1 or logits.stride(-2) < logits.shape[-1] or targets.numel() == 0:
            return None
        flat = targets.long()
        if logits.ndim == 2:
            return DenseRows(1, flat.contiguous(), targets.shape)
        batch, width = targets.shape
        period, rest = logits.stride(0) // logits.stride(1), logits.stride(0) % logits.stride(1)
        if batch == 1:
            period, rest = width, 0
        if rest or period < width:
            return None
        if period > width:
            flat = torch.nn.functional.pad(flat, (0, period - width), value=IGNORE_INDEX)
        rows = (batch - 1) * period + width
        return DenseRows(period, flat.reshape(-1)[:rows].contiguous(), targets.shape)

    def matrix(self, logits: Tensor) -> Tensor:
        """[M, V] the rows, in the memory of the logits."""
        return logits.as_strided((len(self.targets), logits.shape[-1]), (logits.stride(-2), 1))

    def select(self, rows: Tensor) -> Tensor:
        """Values of rows [M], in the shape of the targets."""
        if len(self.shape) == 1:
            return rows
        return rows.as_strided(tuple(self.shape), (self.period, 1)).contiguous()

    def coefficients(
        self, grad_logps: Tensor | None, grad_token_logps: Tensor | None, seq_lens: Tensor | None
    ) -> Tensor:
        """[M] factor of ∇(−logp) of each row, from gradients of sequence log-probs [S] and of token log-probs."""
        parts = []
        if grad_token_logps is not None:
            parts.append(grad_token_logps)
        if grad_logps is not None and seq_lens is None:
            parts.append(grad_logps[:, None].expand(self.shape))
        elif grad_logps is not None and seq_lens is not None:
            ends = seq_lens.to(grad_logps.device, torch.int64, non_blocking=True).cumsum(0)
            places = torch.arange(self.shape[0], device=grad_logps.device)
            # Rows behind the last response have a log-prob that is NaN already.
            response = torch.searchsorted(ends, places, right=True).clamp(max=len(grad_logps) - 1)
            parts.append(grad_logps[response])
        total = -sum(parts[1:], start=parts[0])
        if len(self.shape) == 1 or self.period == self.shape[1]:
            return total.reshape(-1)
        padded = torch.nn.functional.pad(total, (0, self.period - self.shape[1]))
        return padded.reshape(-1)[: len(self.targets)]


def sequence_sums(token_logps: Tensor, seq_lens: Tensor | None) -> Tensor:
    """[S] sums over the tokens [B, T], or over packed ones [N]; NaN where `seq_lens` are no lengths that add up to N.

    Taken in float64, in a fixed order.
    """
    exact = token_logps.to(exact_dtype(token_logps.device))
    if seq_lens is None:
        return exact.sum(1).to(token_logps.dtype)
    ends = seq_lens.to(token_logps.device, torch.int64, non_blocking=True).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends]).clamp(0, len(token_logps)).cummax(0).values
    sums = torch.segment_reduce(exact, "sum", offsets=offsets, unsafe=True, initial=0).to(token_logps.dtype)
    if len(seq_lens) == 0:
        return sums
    wrong = (ends[-1] != len(token_logps)) | (ends.diff(prepend=ends.new_zeros(1)) < 0).any()
    return sums.masked_fill(wrong, float("nan"))


def dense_logps(rows: DenseRows, result: RowLogprob, seq_lens: Tensor | None) -> Logps:
    """Log-probs [S], and token log-probs and entropies in the shape of the targets (empty where there are none)."""
    token_logps = rows.select(result.logp)
    entropies = token_logps.new_empty(0) if result.entropy is None else rows.select(result.entropy)
    return sequence_sums(token_logps, seq_lens), token_logps, entropies
