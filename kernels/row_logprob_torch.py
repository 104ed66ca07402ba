"""row_logprob in plain PyTorch, on any device: what runs where there is no kernel.

It goes through the tile in blocks of rows, so that a second fp32 copy of the whole tile never exists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robust_dpo.kernels.row_logprob import IGNORE_INDEX, RowLogprob, accumulation_dtype, check_arguments

# Elements of one block: 4 MB of fp32 stay in a CPU's cache; a GPU needs large launches.
BLOCK_ELEMENTS = {"cpu": 1 << 20}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 26


def row_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    grad_out: Tensor | None = None,
    row_scale: Tensor | None = None,
    entropy: bool = False,
    known: RowLogprob | None = None,
) -> RowLogprob:
    """Token log-prob of every row, and its gradient in place; see `RowLogprobLauncher`.

    A target that is neither in [0, V) nor `IGNORE_INDEX` gives logp NaN and a gradient without onehot.
    """
    check_arguments(logits, targets, bias, softcap, grad_out, row_scale, entropy, known)
    rows, vocab = logits.shape
    dtype = accumulation_dtype(logits)
    logp = torch.empty(rows, dtype=dtype, device=logits.device)
    result = RowLogprob(logp, torch.empty_like(logp), torch.empty_like(logp) if entropy else None)
    columns = _Columns.of(targets, vocab)
    block = max(1, BLOCK_ELEMENTS.get(logits.device.type, BLOCK_ELEMENTS_ELSEWHERE) // vocab)
    with torch.no_grad():
        for start in range(0, rows, block):
            part = slice(start, start + block)
            values = logits[part].to(dtype)
            if bias is not None:
                values = values + bias.to(dtype)
            if logit_scale != 1.0:
                values = values * logit_scale
            capped = None
            if softcap is not None:
                capped = torch.tanh(values / softcap)
                values = capped * softcap
            if known is None:
                # Relative to the row's maximum: rows of huge logits lose nothing.
                log_probs = values.log_softmax(1)
                result.logp[part] = columns.logp(log_probs, part)
                result.lse[part] = columns.counted(values.logsumexp(1), part)
                if result.entropy is not None:
                    # xlogy-like: a probability of 0 times a log-prob of -inf is 0.
                    terms = log_probs.exp() * log_probs
                    terms = -terms.masked_fill(log_probs == float("-inf"), 0.0).sum(1)
                    result.entropy[part] = columns.counted(terms, part)
            else:
                log_probs = columns.log_probs(values, known, part)
            if grad_out is None:
                continue
            gradient = columns.minus_onehot(log_probs.exp_(), (known or result).logp[part], part)
            if logit_scale != 1.0:
                gradient *= logit_scale
            if capped is not None:
                gradient *= 1.0 - capped * capped
            if row_scale is not None:
                gradient *= row_scale[part, None].to(dtype)
            grad_out[part] = columns.counted(gradient, part)
    return known or result


class _Columns(NamedTuple):
    """Where the targets of rows lie.

    Args:
        target: [n, 1] int64 in [0, V).
        inside: [n] bool, whether that is the target; None where it is for all rows.
        ignored: [n] bool, whether the row belongs to nobody; None where none does.
    """

    target: Tensor
    inside: Tensor | None
    ignored: Tensor | None

    @staticmethod
    def of(targets: Tensor, vocab: int) -> _Columns:
        inside = (targets >= 0) & (targets < vocab)
        # On the CPU a look at the targets is cheap; elsewhere the host would have to wait for the device.
        if targets.device.type == "cpu" and bool(inside.all()):
            return _Columns(targets[:, None], None, None)
        return _Columns(targets.where(inside, 0)[:, None], inside, targets == IGNORE_INDEX)

    def counted(self, values: Tensor, part: slice) -> Tensor:
        """[rows, …] with zeros in the rows that belong to nobody, whatever is there."""
        if self.ignored is None:
            return values
        ignored = self.ignored[part]
        return values.masked_fill(ignored if values.ndim == 1 else ignored[:, None], 0.0)

    def logp(self, log_probs: Tensor, part: slice) -> Tensor:
        """[rows] of [rows, V]; NaN where the target lies outside."""
        logp = log_probs.gather(1, self.target[part])[:, 0]
        return logp if self.inside is None else self.counted(logp.where(self.inside[part], float("nan")), part)

    def log_probs(self, values: Tensor, known: RowLogprob, part: slice) -> Tensor:
        """[rows, V] of logits [rows, V] whose log-probs at the targets are known.

        Relative to the target's logit: in rows of huge logits, the log-sum-exp has lost its last digits.
        """
        logp = known.logp[part, None]
        relative = (values - values.gather(1, self.target[part])) + logp
        usable = logp > float("-inf")
        if self.inside is not None:
            usable &= self.inside[part, None]
        return relative.where(usable, values - known.lse[part, None])

    def minus_onehot(self, probs: Tensor, logp: Tensor, part: slice) -> Tensor:
        """Softmax − onehot over `probs` [rows, V], from the log-probs [rows] of the targets: no digit is cancelled."""
        target, at_target = self.target[part], torch.expm1(logp)[:, None]
        if self.inside is not None:
            at_target = at_target.where(self.inside[part, None], probs.gather(1, target))
        return probs.scatter_(1, target, at_target)
