"""The LM head on a chunk of rows: log-probs forward, and the gradients of their weighted sum backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.kernels.row_logprob import RowLogprob


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

    @staticmethod
    def prepare(
        weight: Tensor, dtype: torch.dtype, bias: Tensor | None, softcap: float | None, logit_scale: float
    ) -> HeadWeights:
        """A head with its weight in the dtype of the products, and with unit column stride, which kernels need."""
        cast = weight.to(dtype)
        return HeadWeights(cast if cast.stride(1) == 1 else cast.contiguous(), bias, softcap, logit_scale)

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
    def forward(
        self, head: HeadWeights, x: Tensor, targets: Tensor, *, keep: bool, entropy: bool = False
    ) -> RowLogprob:
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
