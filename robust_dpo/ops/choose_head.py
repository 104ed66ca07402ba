"""Which head runs a chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_dpo.dispatch import get_row_logprob, has_fused_head
from robust_dpo.ops.gemm_head import GemmHead
from robust_dpo.ops.head import LinearHead


def choose_head(
    weight: Tensor, max_rows: int, *, backend: str = "auto", tile_dtype: torch.dtype | None = None
) -> LinearHead:
    """The head for `weight` and chunks of up to `max_rows` rows.

    The fused head keeps logits in fp32 whatever the inputs' dtype, and is the fastest where it runs. Asking for half
    precision logits takes the products and the row kernel.

    Args:
        weight: [V, H]; its device, dtype and vocabulary count.
        max_rows: of a chunk.
        backend: as in `robust_dpo.backends`.
        tile_dtype: dtype in which logits meet the softmax; None takes the accurate one where it is cheap.
    """
    if _is_fused(weight.device, weight.dtype, backend, tile_dtype):
        # Imports the extension, which is there when the backend says so.
        from robust_dpo.ops.native_head import NativeHead

        return NativeHead(max_rows)
    dtype = weight.dtype if tile_dtype is None else tile_dtype
    return GemmHead(max_rows, weight.shape[0], dtype, weight.device, get_row_logprob(backend, weight.device, dtype))


def hidden_gradient_dtype(
    device: torch.device, dtype: torch.dtype, backend: str, tile_dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype in which the head that `choose_head` takes leaves the gradient of hidden states."""
    if _is_fused(device, dtype, backend, tile_dtype):
        from robust_dpo.ops.native_head import NativeHead

        return NativeHead.hidden_dtype(dtype)
    return GemmHead.hidden_dtype(dtype)


def _is_fused(device: torch.device, dtype: torch.dtype, backend: str, tile_dtype: torch.dtype | None) -> bool:
    return tile_dtype in (None, torch.float32) and has_fused_head(backend, device, dtype)
