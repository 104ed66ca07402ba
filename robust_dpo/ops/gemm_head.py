"""The LM head as matrix products and a row kernel: runs wherever torch does."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_dpo.kernels.row_logprob import RowLogprob, RowLogprobLauncher
from robust_dpo.ops import gemm
from robust_dpo.ops.head import HeadGradients, HeadWeights, LinearHead


class GemmHead(LinearHead):
    """Logits by one GEMM into a tile [n, V], the row kernel in place on it, the gradients by two more GEMMs."""

    def __init__(
        self, max_rows: int, vocab: int, tile_dtype: torch.dtype, device: torch.device, row_logprob: RowLogprobLauncher
    ) -> None:
        self._tile = torch.empty((max_rows, vocab), dtype=tile_dtype, device=device)
        self._row_logprob = row_logprob

    def forward(
        self, head: HeadWeights, x: Tensor, targets: Tensor, *, keep: bool, entropy: bool = False
    ) -> RowLogprob:
        tile = self._tile[: len(x)]
        gemm.logits_into(tile, x, head.weight)
        return self._row_logprob(
            tile,
            targets,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            grad_out=self._gradient_tile(len(x), x.dtype) if keep else None,
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
        z = self._gradient_tile(len(x), x.dtype)
        column = coefficients[:, None]
        if gradients.hidden is not None:
            out = gradients.hidden[start : start + len(x)]
            torch.mul(gemm.times_weight(z, head.weight), column, out=out)
        if gradients.weight is not None:
            gemm.add_product(gradients.weight, z, x, coefficients)
        if gradients.bias is not None:
            gemm.add_weighted_rows(gradients.bias, z, coefficients)

    def _gradient_tile(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Where softmax − onehot goes: over the front of each row, in the dtype that the GEMMs take."""
        tile = self._tile[:rows]
        return tile if tile.dtype == dtype else tile.view(dtype)[:, : tile.shape[1]]
