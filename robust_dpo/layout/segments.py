"""The CPU's backend: prompts and responses attend in calls of their own, and nothing hidden is computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from robust_dpo.layout.attention import AttentionBackend
from robust_dpo.layout.cpu_varlen import CpuVarlenAttention
from robust_dpo.layout.mask import MaskFunction, is_causal_up_to, span_mask
from robust_dpo.layout.masked import masked_attention
from robust_dpo.layout.packing import PackedGroups
from robust_dpo.layout.varlen import SharedPrompts, flattened, shared_prompt_attention


@dataclass(frozen=True)
class _Segments:
    """What one kind of mask comes to, in a layout. Nothing of it depends on the layer."""

    groups: PackedGroups
    model_mask: MaskFunction

    @cached_property
    def causal(self) -> bool:
        device = self.groups.input_ids.device
        return self.model_mask is causal_mask_function or is_causal_up_to(self.model_mask, self.groups.longest, device)

    @cached_property
    def shared(self) -> SharedPrompts:
        return SharedPrompts.of(self.groups)

    @cached_property
    def pieces(self) -> list[tuple[int, Tensor | None]]:
        """Tokens of every piece of the flattened rows, with its mask; None for what is between groups."""
        pieces: list[tuple[int, Tensor | None]] = []
        reached = 0
        for span in sorted(self.groups.spans):
            mask = span_mask(span, self.model_mask, self.groups.input_ids.device)
            pieces += [(span.start - reached, None), (span.length, mask)]
            reached = span.start + span.length
        return [*pieces, (self.groups.input_ids.numel() - reached, None)]


def _prepare(groups: PackedGroups, model_mask: MaskFunction, dtype: torch.dtype) -> _Segments:
    return _Segments(groups, model_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: _Segments,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    flat = flattened(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if mask.causal and softcap is None and not dropout:
        out = shared_prompt_attention(*flat, mask.shared, CpuVarlenAttention(), scale)
    else:
        out = _by_group(*flat, mask, scale, softcap, dropout)
    return out.unflatten(0, mask.groups.input_ids.shape), None


def _by_group(
    query: Tensor, key: Tensor, value: Tensor, mask: _Segments, scale: float, softcap: float | None, dropout: float
) -> Tensor:
    sizes = [size for size, _ in mask.pieces]
    outs = []
    for (_, visible), *piece in zip(mask.pieces, *(each.split(sizes) for each in (query, key, value)), strict=True):
        if visible is None:
            outs.append(torch.zeros_like(piece[0]))
        else:
            q, k, v = (each.transpose(0, 1)[None] for each in piece)
            out = masked_attention(q, k, v, visible, scale=scale, softcap=softcap, dropout=dropout)
            outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _why_not(device: torch.device) -> str:
    return "" if device.type == "cpu" else "its calls are made one by one, from the CPU"


SEGMENTS = AttentionBackend("segments", _prepare, _attend, _why_not, row_tokens=None)
