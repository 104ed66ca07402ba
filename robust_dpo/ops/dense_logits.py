"""Logits that exist already, on a device: one launch over all rows, and nothing read back."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from robust_dpo.kernels.row_logprob import IGNORE_INDEX, RowLogprob
from robust_dpo.ops.host import send
from robust_dpo.ops.logp_pass import Logps
from robust_dpo.ops.precision import exact_dtype
from robust_dpo.ops.row_selection import check_lengths


@dataclass(frozen=True)
class DenseRows:
    """Logits as one matrix of rows, of which those between two responses of a strided tensor belong to nobody.

    `logits[:, :-1]`, the usual shift of [B, T + 1, V], becomes B·(T + 1) − 1 rows; response b begins at b·period.
    Where more would lie between responses than in them (the last few positions of each), or where rows are not side by
    side, the logits are copied: B·T rows.

    Args:
        period: rows from the beginning of a response to that of the next one; T where nothing lies between them.
        targets: [M] int64, `IGNORE_INDEX` for rows of nobody.
        shape: of the targets, [B, T] or packed [N].
        is_copied: whether the rows are a copy of the logits.
    """

    period: int
    targets: Tensor
    shape: torch.Size
    is_copied: bool

    @staticmethod
    def of(logits: Tensor, targets: Tensor) -> DenseRows:
        """The rows of logits [B, T, V] or packed [N, V]."""
        width = targets.shape[-1]
        period = _period(logits if targets.ndim == 2 else logits[None], width)
        flat = targets.long()
        if period is not None and period > width:
            flat = torch.nn.functional.pad(flat, (0, period - width), value=IGNORE_INDEX)
            flat = flat.reshape(-1)[: (len(targets) - 1) * period + width]
        return DenseRows(period or width, flat.reshape(-1), targets.shape, period is None)

    def matrix(self, logits: Tensor) -> Tensor:
        """[M, V] the rows, in the memory of the logits unless they are to be copied."""
        if self.is_copied:
            return logits.reshape(-1, logits.shape[-1])
        return logits.as_strided((len(self.targets), logits.shape[-1]), (logits.stride(-2), 1))

    def new_gradient(self, logits: Tensor) -> Tensor:
        """Room for the gradient of the logits, laid out as `matrix` reads them."""
        if self.is_copied:
            return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)

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
        elif grad_logps is not None and seq_lens is not None and len(grad_logps):
            ends = sequence_ends(seq_lens, self.shape[0], grad_logps.device)
            places = torch.arange(self.shape[0], device=grad_logps.device)
            # Rows behind the last response have a log-prob that is NaN already.
            response = torch.searchsorted(ends, places, right=True).clamp(max=len(grad_logps) - 1)
            parts.append(grad_logps[response])
        total = -sum(parts, start=torch.zeros((), device=self.targets.device))
        if len(self.shape) == 1 or self.period == self.shape[1]:
            return total.expand(self.shape).reshape(-1)
        padded = torch.nn.functional.pad(total, (0, self.period - self.shape[1]))
        return padded.reshape(-1)[: len(self.targets)]


def sequence_ends(seq_lens: Tensor, rows: int, device: torch.device) -> Tensor:
    """[S] int64 on the device, the row behind each response; the host waits for nothing.

    Raises:
        ValueError: `seq_lens` are on the CPU, and are no lengths that add up to `rows`.
    """
    if seq_lens.device.type != "cpu":
        return seq_lens.long().cumsum(0)
    lens = seq_lens.tolist()
    check_lengths(min(lens, default=0), sum(lens), rows)
    return send([*accumulate(lens)], device)


def sequence_sums(token_logps: Tensor, ends: Tensor | None) -> Tensor:
    """[S] sums over the tokens [B, T], or over packed ones [N], where `ends` are the rows behind responses.

    Taken in float64, in a fixed order. NaN where the ends do not increase, or the last one is not N.
    """
    exact = token_logps.to(exact_dtype(token_logps.device))
    if ends is None:
        return exact.sum(1).to(token_logps.dtype)
    offsets = torch.cat([ends.new_zeros(1), ends])
    bounds = offsets.clamp(0, len(token_logps)).cummax(0).values
    sums = torch.segment_reduce(exact, "sum", offsets=bounds, unsafe=True, initial=0).to(token_logps.dtype)
    wrong = (offsets[-1] != len(token_logps)) | (offsets.diff() < 0).any()
    return sums.masked_fill(wrong, float("nan"))


def dense_logps(rows: DenseRows, result: RowLogprob, seq_lens: Tensor | None) -> Logps:
    """Log-probs [S], and token log-probs and entropies in the shape of the targets (empty where there are none)."""
    token_logps = rows.select(result.logp)
    entropies = token_logps.new_empty(0) if result.entropy is None else rows.select(result.entropy)
    ends = None if seq_lens is None else sequence_ends(seq_lens, len(token_logps), token_logps.device)
    return sequence_sums(token_logps, ends), token_logps, entropies


def _period(logits: Tensor, width: int) -> int | None:
    """Rows from response to response of logits [B, T, V]; None where they are better copied."""
    batch, _, vocab = logits.shape
    if logits.stride(2) != 1 or logits.stride(1) < vocab or logits.numel() == 0:
        return None
    if batch == 1:
        return width
    period, rest = logits.stride(0) // logits.stride(1), logits.stride(0) % logits.stride(1)
    return None if rest or not width <= period <= 2 * width else period
