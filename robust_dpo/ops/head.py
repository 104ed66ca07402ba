"""The LM head on a chunk of rows: log-probs forward, and the gradients of their weighted sum backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.kernels.rescale import RescaleLauncher
from robust_dpo.kernels.row_logprob import RowLogprob
from robust_dpo.ops.scaling import product


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
        hidden: [N, H], a row for every response row; the gradient of the row is its entry of `hidden_factors` times it.
        hidden_factors: [N] in the accumulation dtype.
        weight: [V, H] in the accumulation dtype.
        bias: [V] in the accumulation dtype.
        weight_is_empty: nothing was written to `weight` yet, whose contents are undefined.
    """

    hidden: Tensor | None
    hidden_factors: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    weight_is_empty: bool

    @property
    def wanted(self) -> bool:
        return any(part is not None for part in (self.hidden, self.weight, self.bias))

    def finished_hidden(self, dtype: torch.dtype) -> Tensor | None:
        """[N, H] the gradient of the rows in `dtype`; uses up `hidden`."""
        if self.hidden is None or self.hidden_factors is None:
            return None
        return product(self.hidden, self.hidden_factors[:, None], dtype, reuse=True)

    def rescale(self, factor: Tensor, rescale: RescaleLauncher) -> None:
        """Multiply everything accumulated so far by a factor [] on the device."""
        for part in (self.hidden_factors, self.weight, self.bias):
            if part is not None:
                rescale(part, factor)


class LinearHead(ABC):
    """A head with the workspace for chunks of up to `max_rows` rows, reused from chunk to chunk."""

    # Whether `backward` gives the first [V, H] product its place, so that nothing needs to be cleared before it.
    overwrites_weight = False
    # Whether `forward` writes logits down even without `keep`, so that its chunks take memory.
    writes_logits = True

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

    @abstractmethod
    def release(self) -> None:
        """Free the workspace; nothing is called after it."""

    @staticmethod
    @abstractmethod
    def hidden_dtype(dtype: torch.dtype) -> torch.dtype:
        """The dtype of `HeadGradients.hidden` for a head of `dtype`."""

    def allocate(self, head: HeadWeights, rows: int, hidden: bool, weight: bool, bias: bool) -> HeadGradients:
        """Accumulators of the gradients that are wanted, as this head fills them."""
        vocab, width = head.weight.shape
        dtype = head.accumulation_dtype
        zeros = head.weight.new_zeros
        empty = self.overwrites_weight and rows > 0
        allocate_weight = head.weight.new_empty if empty else zeros
        return HeadGradients(
            hidden=head.weight.new_empty((rows, width), dtype=self.hidden_dtype(head.weight.dtype)) if hidden else None,
            hidden_factors=zeros(rows, dtype=dtype) if hidden else None,
            weight=allocate_weight((vocab, width), dtype=dtype) if weight else None,
            bias=zeros(vocab, dtype=dtype) if bias else None,
            weight_is_empty=empty,
        )
