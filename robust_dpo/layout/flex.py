"""FlexAttention: the mask as a function, compiled into a kernel that skips blocks in which nobody sees anybody."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flex_attention import flex_attention_forward

from robust_dpo.layout.attention import AttentionBackend, LayoutUnsupportedError
from robust_dpo.layout.mask import MaskFunction, group_mask
from robust_dpo.layout.packing import PackedGroups

_BLOCK = 128
# Entries of the mask that are made at once. A row of 50,000 tokens has 2.5 billion of them.
_ENTRIES = 1 << 24


def block_mask(groups: PackedGroups, model_mask: MaskFunction) -> BlockMask:
    """The mask of packed groups in blocks of 128 × 128, for `torch.nn.attention.flex_attention`.

    That of `create_block_mask`, which holds the whole T × T mask; here it is made and counted in strips of queries.
    """
    count, width = groups.input_ids.shape
    visible = group_mask(groups, model_mask)
    blocks = -(-width // _BLOCK)
    strip = max(1, _ENTRIES // (count * blocks * _BLOCK**2))
    seen = torch.cat(
        [
            _seen(visible, groups.input_ids, start, min(start + strip, blocks), blocks)
            for start in range(0, blocks, strip)
        ],
        dim=1,
    )
    full = seen == _BLOCK**2
    return BlockMask.from_kv_blocks(
        *_ordered((seen > 0) & ~full),
        *_ordered(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(width, width),
    )


def _seen(visible: MaskFunction, input_ids: Tensor, start: int, stop: int, blocks: int) -> Tensor:
    """[R, stop - start, blocks] int64: pairs that see each other in the blocks of some block rows."""
    count, width = input_ids.shape
    row = torch.arange(count, device=input_ids.device)[:, None, None]
    place = torch.arange(blocks * _BLOCK, device=input_ids.device)
    there, place = place < width, place.clamp(max=width - 1)
    queries = slice(start * _BLOCK, stop * _BLOCK)
    mask: Tensor = visible(row, 0, place[queries, None], place) & there[queries, None] & there
    return mask.view(count, stop - start, _BLOCK, blocks, _BLOCK).sum((2, 4))


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of every block row its chosen blocks: how many [R, 1, blocks], and which, first [R, 1, blocks, blocks], int32."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int()[:, None], order.int()[:, None]


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
