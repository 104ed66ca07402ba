"""What every row_logprob launcher takes and gives: its result, and the checks of its arguments."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from robust_dpo.errors import argument_error

# The target of a row that belongs to nobody, as in PyTorch's cross-entropy.
IGNORE_INDEX = -100
TILE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class RowLogprob(NamedTuple):
    """Of each row of a tile, in fp32 (float64 for float64 tiles).

    Args:
        logp: [n] logits[target] - lse.
        lse: [n] log-sum-exp of the logits.
        entropy: [n] in nats, or None where it was not asked for.
    """

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None


class RowLogprobLauncher(Protocol):
    """row_logprob on one backend.

    logits = softcap * tanh(logit_scale * (z + bias) / softcap), without the tanh where `softcap` is None; arithmetic in
    fp32 (float64 for float64 tiles) whatever the dtype of the tile. A NaN in a row makes all its results NaN.

    Args:
        logits: [n, V] z, fp32, bf16, fp16 or float64; unit column stride.
        targets: [n] int64 in [0, V), or `IGNORE_INDEX`: such a row need not be read; its results are 0, its gradient is
            0. On the CPU the caller checks that there are no others; elsewhere, where that would need a read, any other
            gives logp NaN and a gradient without onehot, and nothing is accessed out of bounds.
        bias: [V], added to z.
        softcap: > 0.
        logit_scale: factor of z + bias.
        grad_out: [n, V], filled with row_scale * (softmax - onehot(target)) * d logits / d z. May be `logits` itself,
            or rows that begin where those of `logits` begin, in a dtype that is no wider; else it must not overlap.
        row_scale: [n] factor of each row of the gradient, default 1.
        entropy: whether to compute it.
        known: what an earlier call gave for the same rows, so that only the gradient is left to do; not with `entropy`.

    Raises:
        ValueError: a shape, dtype, device or layout is wrong.
    """

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        grad_out: Tensor | None = None,
        row_scale: Tensor | None = None,
        entropy: bool = False,
        known: RowLogprob | None = None,
    ) -> RowLogprob: ...


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 tiles, otherwise float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def check_arguments(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    grad_out: Tensor | None,
    row_scale: Tensor | None,
    entropy: bool,
    known: RowLogprob | None,
) -> None:
    """Refuse what no launcher can run; see `RowLogprobLauncher`."""
    if logits.dtype not in TILE_DTYPES:
        raise argument_error("logits", "dtype float32, bfloat16, float16 or float64", logits.dtype)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise argument_error("logits", "shape [n, V] with V > 0", tuple(logits.shape))
    rows, vocab = logits.shape
    _check_rows("logits", logits)
    _check_vector("targets", targets, rows, logits.device)
    if targets.dtype != torch.int64:
        raise argument_error("targets", "dtype torch.int64", targets.dtype)
    if softcap is not None and not softcap > 0:
        raise argument_error("softcap", "a positive number or None", softcap)
    if bias is not None:
        _check_vector("bias", bias, vocab, logits.device)
    if row_scale is not None:
        _check_vector("row_scale", row_scale, rows, logits.device)
    if grad_out is not None:
        _check_gradient(grad_out, logits)
    if known is not None:
        _check_known(known, logits, grad_out, entropy)


def _check_known(known: RowLogprob, logits: Tensor, grad_out: Tensor | None, entropy: bool) -> None:
    if grad_out is None:
        raise argument_error("grad_out", "a tensor to fill, as the results are known", None)
    if entropy:
        raise argument_error("entropy", "False, as the results are known", entropy)
    for name, vector in (("known.logp", known.logp), ("known.lse", known.lse)):
        _check_vector(name, vector, len(logits), logits.device)
        if vector.dtype != accumulation_dtype(logits):
            raise argument_error(name, f"dtype {accumulation_dtype(logits)}", vector.dtype)


def _check_vector(name: str, vector: Tensor, size: int, device: torch.device) -> None:
    if vector.shape != (size,):
        raise argument_error(name, f"shape [{size}]", tuple(vector.shape))
    if vector.device != device:
        raise argument_error(name, f"a tensor on {device}, as logits", vector.device)


def _check_rows(name: str, matrix: Tensor) -> None:
    rows, vocab = matrix.shape
    if vocab > 1 and matrix.stride(1) != 1:
        raise argument_error(name, "unit stride within a row", matrix.stride())
    if rows > 1 and matrix.stride(0) < vocab:
        raise argument_error(name, f"a row stride of at least {vocab}", matrix.stride(0))


def _check_gradient(grad_out: Tensor, logits: Tensor) -> None:
    if grad_out.shape != logits.shape:
        raise argument_error("grad_out", f"shape {list(logits.shape)}, as logits", tuple(grad_out.shape))
    if grad_out.device != logits.device:
        raise argument_error("grad_out", f"a tensor on {logits.device}, as logits", grad_out.device)
    if grad_out.dtype not in TILE_DTYPES or (grad_out.dtype == torch.float64) != (logits.dtype == torch.float64):
        raise argument_error("grad_out", f"a floating dtype that goes with logits of {logits.dtype}", grad_out.dtype)
    _check_rows("grad_out", grad_out)
    tile_start, tile_end = _extent(logits)
    grad_start, grad_end = _extent(grad_out)
    if tile_end <= grad_start or grad_end <= tile_start:
        return
    same_rows = grad_start == tile_start and (
        len(logits) == 1 or grad_out.stride(0) * grad_out.itemsize == logits.stride(0) * logits.itemsize
    )
    if not same_rows or grad_out.itemsize > logits.itemsize:
        raise argument_error(
            "grad_out", "memory apart from logits, or rows that begin where those of logits begin", "a partial overlap"
        )


def _extent(matrix: Tensor) -> tuple[int, int]:
    """First byte, and the byte behind the last one."""
    start = matrix.data_ptr()
    if matrix.numel() == 0:
        return start, start
    elements = (matrix.shape[0] - 1) * matrix.stride(0) + matrix.shape[1]
    return start, start + elements * matrix.element_size()
