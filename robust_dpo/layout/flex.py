"""FlexAttention: the mask as a function, compiled into a kernel that skips blocks in which nobody sees anybody."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.integrations.flex_attention import flex_attention_forward

from robust_dpo.layout.attention import AttentionBackend, LayoutUnsupportedError
from robust_dpo.layout.mask import MaskFunction, group_mask
from robust_dpo.layout.packing import PackedGroups


def block_mask(groups: PackedGroups, model_mask: MaskFunction) -> BlockMask:
    """The mask of packed groups in blocks of 128 × 128, for `torch.nn.attention.flex_attention`."""
    count, width = groups.input_ids.shape
    visible = group_mask(groups, model_mask)
    return create_block_mask(visible, count, None, width, width, device=str(groups.input_ids.device))


def _prepare(groups: PackedGroups, model_mask: MaskFunction, dtype: torch.dtype) -> BlockMask:
    return block_mask(groups, model_mask)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, dropout: float = 0.0, **options: Any
) -> tuple[Tensor, Any]:
    if dropout:
        raise LayoutUnsupportedError("its attention has dropout, which flex_attention has not")
    attended: tuple[Tensor, Any] = flex_attention_forward(module, query, key, value, mask, **options)
    return attended


def _why_not(device: torch.device) -> str:
    return "" if device.type == "cuda" else "flex_attention has no backward pass there"


FLEX = AttentionBackend("flex", _prepare, _attend, _why_not, row_tokens=None)
