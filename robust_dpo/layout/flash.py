"""FlashAttention's kernels for packed sequences, around which the parts of shared prompts are merged."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from robust_dpo.layout.attention import AttentionBackend, LayoutUnsupportedError
from robust_dpo.layout.mask import MaskFunction, is_causal_up_to
from robust_dpo.layout.packing import PackedGroups
from robust_dpo.layout.varlen import (
    Scoring,
    Sequences,
    SharedPrompts,
    VarlenAttention,
    WindowedSequences,
    flattened,
    shared_prompt_attention,
    windowed_attention,
)


class FlashVarlenAttention:
    """`flash_attn`'s forward and backward over packed sequences (2.7 or newer, fp16 and bf16 on a GPU)."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        if query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] % 8 or query.shape[-1] > 256:
            raise LayoutUnsupportedError(
                "flash-attn takes fp16 or bf16 and heads of a multiple of 8 up to 256, and its heads are "
                f"{query.shape[-1]} wide in {query.dtype}"
            )
        out, lse, _, _ = _flash_attn_varlen_forward(
            query, key, value, **_places(sequences), **_settings(scoring), return_softmax=False
        )
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
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        _flash_attn_varlen_backward(
            grad.contiguous(),
            query,
            key,
            value,
            out,
            lse,
            *grads,
            **_places(sequences),
            **_settings(scoring),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads


def _places(sequences: Sequences) -> dict[str, Any]:
    return {
        "cu_seqlens_q": sequences.query_starts,
        "cu_seqlens_k": sequences.key_starts,
        "max_seqlen_q": max(sequences.queries),
        "max_seqlen_k": max(sequences.keys),
    }


def _settings(scoring: Scoring) -> dict[str, Any]:
    windowed = scoring.window is not None
    return {
        "dropout_p": 0.0,
        "softmax_scale": scoring.scale,
        "causal": scoring.causal,
        "window_size_left": scoring.window - 1 if scoring.window is not None else -1,
        "window_size_right": 0 if windowed else -1,
        "softcap": scoring.softcap or 0.0,
        "alibi_slopes": None,
    }


@dataclass(frozen=True)
class VarlenMask:
    """What one kind of mask comes to, in a layout. Nothing of it depends on the layer."""

    groups: PackedGroups
    model_mask: MaskFunction

    def window(self, declared: int | None) -> int | None:
        """How many keys a query sees, where that hides something; `declared` is what the layer says.

        Raises:
            LayoutUnsupportedError: the mask is neither causal nor a declared window.
        """
        longest = self.groups.longest
        if self.model_mask is causal_mask_function or (declared is not None and declared >= longest):
            return None
        # Asks the device, so only where neither the mask nor the layer has said it.
        if declared is None and not is_causal_up_to(self.model_mask, longest, self.groups.input_ids.device):
            raise LayoutUnsupportedError("its mask is neither causal nor a sliding window")
        return declared

    @cached_property
    def shared(self) -> SharedPrompts:
        return SharedPrompts.of(self.groups)

    @cached_property
    def windowed(self) -> WindowedSequences:
        return WindowedSequences.of(self.groups)


def attend_varlen(
    attention: VarlenAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: VarlenMask,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Attention of packed groups through calls for packed sequences.

    Args:
        attention: what computes them.
        query, key, value: [R, heads or kv_heads, T, D].
        mask: of the layout.
        scale, softcap: of the scores.
        window: keys that a query sees, itself included, as the layer declares it.

    Returns:
        [R, T, heads, D].

    Raises:
        LayoutUnsupportedError: the model's mask is neither causal nor a sliding window.
    """
    flat = flattened(query, key, value)
    window = mask.window(window)
    if window is None:
        out = shared_prompt_attention(*flat, mask.shared, attention, scale, softcap)
    else:
        out = windowed_attention(*flat, mask.windowed, attention, Scoring(scale, True, softcap, window))
    rows: Tensor = out.unflatten(0, mask.groups.input_ids.shape)
    return rows


def _prepare(groups: PackedGroups, model_mask: MaskFunction, dtype: torch.dtype) -> VarlenMask:
    return VarlenMask(groups, model_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: VarlenMask,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if dropout:
        raise LayoutUnsupportedError("its attention has dropout, whose pattern two merged parts do not share")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attention: VarlenAttention = FlashVarlenAttention()
    out = attend_varlen(attention, query, key, value, mask, scale=scale, softcap=softcap, window=sliding_window)
    return out, None


def _why_not(device: torch.device) -> str:
    if device.type != "cuda":
        return "flash-attn runs on NVIDIA GPUs"
    return "" if find_spec("flash_attn") else "flash-attn is not installed (pip install robust_dpo[flash])"


FLASH = AttentionBackend("flash", _prepare, _attend, _why_not, row_tokens=None, half_precision=True)
