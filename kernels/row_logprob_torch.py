"""row_logprob in plain PyTorch, on any device: what runs where there is no kernel.

It goes through the tile in blocks of rows, so that a second fp32 copy of the whole tile never exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_dpo.kernels.row_logprob import RowLogprob, accumulation_dtype, check_arguments

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
) -> RowLogprob:
    """Token log-prob of every row, and its gradient in place; see `RowLogprobLauncher`."""
    check_arguments(logits, targets, bias, softcap, grad_out, row_scale)
    rows, vocab = logits.shape
    dtype = accumulation_dtype(logits)
    logp = torch.empty(rows, dtype=dtype, device=logits.device)
    lse = torch.empty_like(logp)
    entropies = torch.empty_like(logp) if entropy else None
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
            target = targets[part, None]
            lse[part] = values.logsumexp(1)
            # Relative to the row's maximum: rows of huge logits lose nothing.
            log_probs = values.log_softmax(1)
            target_logp = log_probs.gather(1, target)
            logp[part] = target_logp[:, 0]
            if entropies is not None:
                # xlogy-like: a probability of 0 times a log-prob of -inf is 0.
                terms = log_probs.exp() * log_probs
                entropies[part] = -terms.masked_fill(log_probs == float("-inf"), 0.0).sum(1)
            if grad_out is None:
                continue
            gradient = log_probs.exp_().scatter_(1, target, torch.expm1(target_logp))
            if logit_scale != 1.0:
                gradient *= logit_scale
            if capped is not None:
                gradient *= 1.0 - capped * capped
            if row_scale is not None:
                gradient *= row_scale[part, None].to(dtype)
            grad_out[part] = gradient
    return RowLogprob(logp, lse, entropies)
