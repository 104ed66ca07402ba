"""Attention under an explicit mask, in plain PyTorch: for what no fused kernel computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scores where the mask allows) · value.

    Args:
        query: [B, heads, L, D].
        key, value: [B, kv_heads, L, D]; heads is a multiple of kv_heads.
        mask: [L, L] or [B, 1, L, L] bool, True where a query sees a key.
        scale: of the scores; None is 1/√D.
        softcap: scores become softcap · tanh(score / softcap).
        dropout: probability of a weight to be dropped.

    Returns:
        [B, heads, L, D].
    """
    shared = query.shape[1] // key.shape[1]
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=shared > 1
        )
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    exact = torch.promote_types(query.dtype, torch.float32)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=exact).to(value.dtype)
    return nn.functional.dropout(weights, dropout) @ value
