"""Attention of packed sequences in plain PyTorch, in place of flash-attn's kernels: every feature, no speed."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from robust_dpo.layout.varlen import Scoring, Sequences


class TorchVarlenAttention:
    """What `FlashVarlenAttention` promises, sequence by sequence with a mask; the backward pass by the formulas."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        out = torch.full_like(query, float("nan"))
        lse = torch.full(
            (query.shape[1], len(query)), float("nan"), dtype=torch.promote_types(query.dtype, torch.float32)
        )
        for at, seen in _places(sequences):
            scores, _ = _scores(query[at], key[seen], scoring)
            lse[:, at] = scores.logsumexp(-1)
            out[at] = ((scores - lse[:, at, None]).exp() @ _heads(value[seen], query)).transpose(0, 1).to(out.dtype)
        return out, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Sequences,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = [torch.full_like(each, float("nan")) for each in (query, key, value)]
        for at, seen in _places(sequences):
            scores, slope = _scores(query[at], key[seen], scoring)
            weights = (scores - lse[:, at, None]).exp()
            upstream, k, v = _wide(grad[at]).transpose(0, 1), _heads(key[seen], query), _heads(value[seen], query)
            row_sums = (_wide(grad[at]) * _wide(out[at])).sum(-1).t()
            grad_scores = weights * (upstream @ v.transpose(1, 2) - row_sums[..., None]) * slope * scoring.scale
            grads[0][at] = (grad_scores @ k).transpose(0, 1).to(query.dtype)
            grads[1][seen] = _shared(grad_scores.transpose(1, 2) @ _wide(query[at]).transpose(0, 1), key)
            grads[2][seen] = _shared(weights.transpose(1, 2) @ upstream, value)
        return grads[0], grads[1], grads[2]


def _places(sequences: Sequences) -> list[tuple[slice, slice]]:
    starts = [pairwise(each.tolist()) for each in (sequences.query_starts, sequences.key_starts)]
    return [(slice(*at), slice(*seen)) for at, seen in zip(*starts, strict=True)]


def _scores(query: Tensor, key: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Scores [heads, Lq, Lk], −inf where hidden, and their slope in scale · q·k."""
    scores = _wide(query).transpose(0, 1) @ _heads(key, query).transpose(1, 2) * scoring.scale
    slope = torch.ones_like(scores)
    if scoring.softcap is not None:
        capped = torch.tanh(scores / scoring.softcap)
        scores, slope = scoring.softcap * capped, 1 - capped.square()
    if scoring.causal:
        at = torch.arange(len(query))[:, None] + len(key) - len(query)
        seen = torch.arange(len(key))
        hidden = seen > at
        if scoring.window is not None:
            hidden = hidden | (seen <= at - scoring.window)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores, slope


def _heads(tensor: Tensor, query: Tensor) -> Tensor:
    """[L, kv_heads, D] → [heads, L, D]."""
    return _wide(tensor).transpose(0, 1).repeat_interleave(query.shape[1] // tensor.shape[1], 0)


def _shared(gradient: Tensor, tensor: Tensor) -> Tensor:
    """[heads, L, D], summed over the heads that share one of `tensor` [L, kv_heads, D]."""
    return gradient.unflatten(0, (tensor.shape[1], -1)).sum(1).transpose(0, 1).to(tensor.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
