"""The LM head as matrix products and a row kernel: runs wherever torch does."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_dpo.kernels.row_logprob import RowLogprob, RowLogprobLauncher
from robust_dpo.ops import gemm
from robust_dpo.ops.head import HeadGradients, HeadWeights, LinearHead

_ALIGNMENT = 64


class GemmHead(LinearHead):
    """Logits by one GEMM into a tile [n, V], the row kernel in place on it, the gradients by two more GEMMs."""

    overwrites_weight = True

    def __init__(
        self, max_rows: int, vocab: int, tile_dtype: torch.dtype, device: torch.device, row_logprob: RowLogprobLauncher
    ) -> None:
        # Rows that begin at multiples of 128 bytes: every load of a kernel is aligned, and cuBLAS has its fast path.
        stride = -(-vocab // _ALIGNMENT) * _ALIGNMENT if device.type == "cuda" else vocab
        self._storage = torch.empty((max_rows, stride), dtype=tile_dtype, device=device)
        self._vocab = vocab
        self._row_logprob = row_logprob

    @staticmethod
    def hidden_dtype(dtype: torch.dtype) -> torch.dtype:
        """That of the product, which is rounded once and multiplied by its factor at the end."""
        return dtype

    def forward(
        self, head: HeadWeights, x: Tensor, targets: Tensor, *, keep: bool, entropy: bool = False
    ) -> RowLogprob:
        tile = self._tile(len(x), self._storage.dtype)
        gemm.logits_into(tile, x, head.weight)
        return self._row_logprob(
            tile,
            targets,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            grad_out=self._tile(len(x), x.dtype) if keep else None,
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
        z = self._tile(len(x), x.dtype)
        if gradients.hidden is not None and gradients.hidden_factors is not None:
            rows = slice(start, start + len(x))
            gemm.times_weight_into(gradients.hidden[rows], z, head.weight)
            gradients.hidden_factors[rows] = coefficients
        if gradients.weight is not None:
            gemm.add_product(gradients.weight, z, x, coefficients, first=gradients.weight_is_empty)
            gradients.weight_is_empty = False
        if gradients.bias is not None:
            gemm.add_weighted_rows(gradients.bias, z, coefficients)

    def release(self) -> None:
        self._storage = self._storage.new_empty(0, 0)

    def _tile(self, rows: int, dtype: torch.dtype) -> Tensor:
        """[rows, V] of the workspace in a dtype that is no wider: softmax − onehot goes over the front of each row."""
        return self._storage[:rows].view(dtype)[:, : self._vocab]
