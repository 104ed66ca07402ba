"""The LM head fused with its softmax in the native CPU extension."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_dpo.kernels import linear_head_cpu as native
from robust_dpo.kernels.row_logprob import RowLogprob
from robust_dpo.ops.head import HeadGradients, HeadWeights, LinearHead


class NativeHead(LinearHead):
    """Products and softmax in one kernel each way. Logits stay in fp32 registers; only their exponentials are kept."""

    overwrites_weight = True
    writes_logits = False

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._tile: native.Tile | None = None

    @staticmethod
    def hidden_dtype(dtype: torch.dtype) -> torch.dtype:
        """The kernel's accumulators, with the coefficients applied."""
        return torch.promote_types(dtype, torch.float32)

    def forward(
        self, head: HeadWeights, x: Tensor, targets: Tensor, *, keep: bool, entropy: bool = False
    ) -> RowLogprob:
        if keep and self._tile is None:
            self._tile = native.Tile.allocate(self._max_rows, len(head.weight), x.dtype)
        return native.head_forward(
            x,
            head.weight,
            targets,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            tile=self._tile if keep else None,
            entropy=entropy,
        )

    def backward(
        self,
        head: HeadWeights,
        x: Tensor,
        targets: Tensor,
        forward: RowLogprob,
        coefficients: Tensor,
        gradients: HeadGradients,
        start: int,
    ) -> None:
        if len(x) == 0:
            return
        assert self._tile is not None, "backward needs a forward with keep=True"
        rows = slice(start, start + len(x))
        if gradients.hidden_factors is not None:
            gradients.hidden_factors[rows] = 1.0
        native.head_backward(
            self._tile,
            x,
            head.weight,
            targets,
            forward.lse,
            coefficients,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            grad_x=None if gradients.hidden is None else gradients.hidden[rows],
            grad_weight=gradients.weight,
            grad_bias=gradients.bias,
            overwrite_weight=gradients.weight_is_empty,
        )
        gradients.weight_is_empty = False

    def release(self) -> None:
        self._tile = None
