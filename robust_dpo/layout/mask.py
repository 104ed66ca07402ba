"""Who sees whom in a row of packed groups, as a mask function and as dense masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from robust_dpo.layout.packing import GroupSpan, PackedGroups

MaskFunction: TypeAlias = Callable[[Any, Any, Any, Any], Any]
"""(batch, head, query, key) → bool, elementwise over index tensors, as in transformers' masking utilities."""


def group_mask(groups: PackedGroups, model_mask: MaskFunction) -> MaskFunction:
    """The mask function of a row.

    Args:
        groups: the layout, on the device where the mask is used.
        model_mask: what the model lets a token see in one unbroken sequence: causal, windowed, chunked. It is asked
            with positions in place of places, so that a window counts tokens of the prompt and of the response.
    """
    group_ids, response_ids, positions = groups.group_ids, groups.response_ids, groups.position_ids

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        response = response_ids[batch, key]
        same_group = group_ids[batch, query] == group_ids[batch, key]
        same_response = (response == 0) | (response == response_ids[batch, query])
        allowed = model_mask(batch, head, positions[batch, query], positions[batch, key])
        return same_group & same_response & allowed

    return visible


def dense_mask(groups: PackedGroups, model_mask: MaskFunction) -> Tensor:
    """[R, 1, T, T] bool, True where the query (second to last) sees the key."""
    count, width = groups.input_ids.shape
    device = groups.input_ids.device
    row = torch.arange(count, device=device)[:, None, None, None]
    place = torch.arange(width, device=device)
    visible: Tensor = group_mask(groups, model_mask)(row, 0, place[:, None], place)
    return visible


def span_mask(span: GroupSpan, model_mask: MaskFunction, device: torch.device) -> Tensor:
    """[L, L] bool, the mask of the L tokens of one group."""
    runs = (span.prompt, *span.responses)
    member = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs)).to(device)
    starts = [0, *(span.prompt for _ in span.responses)]
    position = torch.cat([torch.arange(start, start + run) for start, run in zip(starts, runs, strict=True)]).to(device)
    allowed = model_mask(0, 0, position[:, None], position)
    visible: Tensor = ((member == 0) | (member == member[:, None])) & allowed
    return visible


def is_causal_up_to(model_mask: MaskFunction, length: int, device: torch.device) -> bool:
    """Whether a token at position `length` - 1 sees all before it: no window or chunk ends within that many tokens."""
    keys = torch.arange(length, device=device)
    return bool(torch.as_tensor(model_mask(0, 0, keys[-1:], keys)).all())
