"""The loop over chunks that both forms of `sequence_logps` share: token log-probs, summed by response."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robust_dpo.kernels.row_logprob import RowLogprob
from robust_dpo.ops.rows import ResponseRows, cut_rows

# Log-probs [S], token log-probs and entropies shaped like the targets (entropies empty where not asked for).
Logps = tuple[Tensor, Tensor, Tensor]


def logp_pass(
    rows: ResponseRows,
    targets: Tensor,
    max_rows: int,
    dtype: torch.dtype,
    entropy: bool,
    forward: Callable[[int, int], RowLogprob],
) -> Logps:
    """Run `forward(start, stop)` over the response rows, at most `max_rows` at a time."""
    token_logps = torch.zeros(rows.count, dtype=dtype, device=targets.device)
    entropies = torch.zeros_like(token_logps)
    for start, stop in cut_rows(0, rows.count, max_rows):
        result = forward(start, stop)
        token_logps[start:stop] = result.logp
        if result.entropy is not None:
            entropies[start:stop] = result.entropy
    if rows.counted is not None:
        for each in (token_logps, entropies):
            each.masked_fill_(~rows.counted, 0.0)
    logps = rows.sequence_sums(token_logps, 0, len(rows.lengths))
    spread = rows.spread(entropies, targets.shape) if entropy else logps.new_empty(0)
    return logps, rows.spread(token_logps, targets.shape), spread


def fake_logps(targets: Tensor, seq_lens: Tensor | None, dtype: torch.dtype, entropy: bool) -> Logps:
    """What `logp_pass` returns, without contents."""
    responses = targets.shape[0] if seq_lens is None else seq_lens.shape[0]
    return (
        targets.new_empty(responses, dtype=dtype),
        targets.new_empty(targets.shape, dtype=dtype),
        targets.new_empty(targets.shape if entropy else (0,), dtype=dtype),
    )
