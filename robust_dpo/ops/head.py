"""The LM head on a chunk of rows: log-probs forward, and the gradients of their weighted sum backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.backends import get_row_logprob
from robust_dpo.kernels.row_logprob import RowLogprob, RowLogprobLauncher
from robust_dpo.ops import gemm


@dataclass(frozen=True)
class HeadWeights:
    """logits = softcap · tanh(logit_scale · (x Wᵀ + bias) / softcap), without the tanh where `softcap` is None.

    Args:
        weight: [V, H].
        bias: [V] or None.
        softcap: > 0 or None.
        logit_scale: factor of x Wᵀ + bias.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """float64 for a float64 head, otherwise float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)


@dataclass
class HeadGradients:
    """Accumulators of the gradients that somebody needs; the others are None.

    Args:
        hidden: [N, H] in the accumulation dtype, a row for every response row.
        weight: [V, H] in the accumulation dtype.
        bias: [V] in the accumulation dtype.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def allocate(head: HeadWeights, rows: int, hidden: bool, weight: bool, bias: bool) -> HeadGradients:
        vocab, width = head.weight.shape
        zeros = head.weight.new_zeros
        dtype = head.accumulation_dtype
        return HeadGradients(
            zeros((rows, width), dtype=dtype) if hidden else None,
            zeros((vocab, width), dtype=dtype) if weight else None,
            zeros(vocab, dtype=dtype) if bias else None,
        )

    @property
    def wanted(self) -> bool:
        return any(part is not None for part in (self.hidden, self.weight, self.bias))

    def scale_(self, factor: float) -> None:
        """Multiply everything accumulated so far."""
        for part in (self.hidden, self.weight, self.bias):
            if part is not None:
                part *= factor


class LinearHead(ABC):
    """A head with the workspace for chunks of up to `max_rows` rows, reused from chunk to chunk."""

    @abstractmethod
    def forward(self, head: HeadWeights, x: Tensor, targets: Tensor, *, keep: bool, entropy: bool = False) -> RowLogprob:
        """Log-probs of the targets [n] under x [n, H]; with `keep`, the workspace then holds what `backward` needs."""

    @abstractmethod
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
        """Add Σ coefficients · ∇(−logp) of the rows that `forward` kept to `gradients`, whose rows begin at `start`.

        Uses up the workspace.
        """


class GemmHead(LinearHead):
    """Logits by one GEMM into a tile [n, V], the row kernel in place on it, the gradients by two more GEMMs."""

    def __init__(
        self, max_rows: int, vocab: int, tile_dtype: torch.dtype, device: torch.device, row_logprob: RowLogprobLauncher
    ) -> None:
        self._tile = torch.empty((max_rows, vocab), dtype=tile_dtype, device=device)
        self._row_logprob = row_logprob

    def forward(self, head: HeadWeights, x: Tensor, targets: Tensor, *, keep: bool, entropy: bool = False) -> RowLogprob:
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
            gemm.add_product(gradients.weight, z, (x * column).to(x.dtype))
        if gradients.bias is not None:
            gemm.add_weighted_rows(gradients.bias, z, coefficients)

    def _gradient_tile(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Where softmax − onehot goes: over the front of each row, in the dtype that the GEMMs take."""
        tile = self._tile[:rows]
        return tile if tile.dtype == dtype else tile.view(dtype)[:, : tile.shape[1]]


def choose_head(
    weight: Tensor, max_rows: int, *, backend: str = "auto", tile_dtype: torch.dtype | None = None
) -> LinearHead:
    """The head for `weight` and chunks of up to `max_rows` rows.

    Args:
        weight: [V, H]; its device, dtype and vocabulary count.
        max_rows: of a chunk.
        backend: as in `robust_dpo.backends`.
        tile_dtype: dtype in which logits meet the softmax; None takes the accurate one where it is cheap.
    """
    dtype = weight.dtype if tile_dtype is None else tile_dtype
    launcher = get_row_logprob(backend, weight.device, dtype)
    return GemmHead(max_rows, weight.shape[0], dtype, weight.device, launcher)
