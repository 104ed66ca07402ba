"""The plain backend: scaled dot-product attention with one explicit mask per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robust_dpo.layout.attention import AttentionBackend
from robust_dpo.layout.mask import MaskFunction, dense_mask
from robust_dpo.layout.masked import masked_attention
from robust_dpo.layout.packing import PackedGroups


def _prepare(groups: PackedGroups, model_mask: MaskFunction, dtype: torch.dtype) -> Tensor:
    return dense_mask(groups, model_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    out = masked_attention(query, key, value, mask, scale=scaling, softcap=softcap, dropout=dropout)
    return out.transpose(1, 2).contiguous(), None


# A mask has T² entries, and all of them are computed: rows are kept short.
SDPA = AttentionBackend("sdpa", _prepare, _attend, why_not=lambda device: "", row_tokens=1024)
