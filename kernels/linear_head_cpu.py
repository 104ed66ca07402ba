"""The LM head fused with its log-softmax, through the native CPU extension (csrc/head.h).

`head_forward` gives the token log-probs of a chunk of rows; no logits are written. Where a gradient will be needed it
fills a `Tile`, from which `head_backward` makes the gradients by hidden states, weight and bias, whatever the
coefficients turn out to be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo import _cpu
from robust_dpo.errors import argument_error, type_error
from robust_dpo.kernels.row_logprob import RowLogprob
from robust_dpo.kernels.row_logprob_cpu import chosen_isa

# The instruction sets (csrc/bindings.cpp) that have a kernel for the dtype.
_ISAS = {torch.float32: ("avx512", "avx512_bf16"), torch.bfloat16: ("avx512_bf16",)}
_ROWS = 16  # rows of a tile are padded to a vector
_STRIP = 8  # and its vocabulary to the rows of a microkernel


def unsupported_reason(dtype: torch.dtype) -> str | None:
    """Why the fused head cannot run on this CPU with hidden states and weight of `dtype`; None if it can."""
    if dtype not in _ISAS:
        return f"it takes {' and '.join(str(each) for each in _ISAS)}, not {dtype}"
    if not hasattr(_cpu, "head_forward"):
        return "it is written for x86-64 with AVX-512, and this build has no code for that"
    if chosen_isa() not in _ISAS[dtype]:
        return f"it needs {_ISAS[dtype][0]} for {dtype}, and {chosen_isa()} is in use"
    return None


@dataclass(frozen=True)
class Tile:
    """What `head_backward` needs of a chunk: its exponentials, in the layout of csrc/head.h. Reused between chunks.

    Args:
        values: [vocab padded to 8, max_rows padded to 16] elements of the dtype of the hidden states.
        references: [vocab blocks, max_rows padded to 16] fp32, what was subtracted before the exponential.
        target_logp: [max_rows] fp32.
        target_derivative: [max_rows] fp32, derivative of the target's logit (1 without softcap).
        vocab: columns that it was made for.
    """

    values: Tensor
    references: Tensor
    target_logp: Tensor
    target_derivative: Tensor
    vocab: int

    @staticmethod
    def bytes_needed(max_rows: int, vocab: int, dtype: torch.dtype) -> int:
        """Bytes of a tile for `max_rows` rows."""
        rows = _padded(max_rows, _ROWS)
        return rows * (_padded(vocab, _STRIP) * dtype.itemsize + 4 * _blocks(vocab)) + 8 * max_rows

    @staticmethod
    def allocate(max_rows: int, vocab: int, dtype: torch.dtype) -> Tile:
        """Room for chunks of at most `max_rows` rows.

        Raises:
            ValueError: a size is negative or zero, or the dtype has no kernel.
        """
        if max_rows < 0:
            raise argument_error("max_rows", "0 or more", max_rows)
        if vocab < 1:
            raise argument_error("vocab", "at least 1", vocab)
        if dtype not in _ISAS:
            raise argument_error("dtype", f"one of {', '.join(str(each) for each in _ISAS)}", dtype)
        rows = _padded(max_rows, _ROWS)
        return Tile(
            values=torch.empty(_padded(vocab, _STRIP) * rows, dtype=dtype),
            references=torch.empty(_blocks(vocab) * rows),
            target_logp=torch.empty(max_rows),
            target_derivative=torch.empty(max_rows),
            vocab=vocab,
        )

    @property
    def max_rows(self) -> int:
        return len(self.target_logp)


def head_forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    tile: Tile | None = None,
    entropy: bool = False,
) -> RowLogprob:
    """Token log-probs of rows of hidden states: logits = softcap * tanh(logit_scale * (x Wᵀ + bias) / softcap).

    Sums are in fp32 from the product on; the result does not depend on the number of threads. A NaN in a row's logits
    makes all its results NaN.

    Args:
        x: [n, H] fp32 or bf16, unit column stride.
        weight: [V, H] of the same dtype, unit column stride.
        targets: [n] int64 in [0, V); the caller checks the range (logp is NaN for others).
        bias: [V], taken as fp32.
        softcap: > 0, or None for none.
        logit_scale: factor of x Wᵀ + bias.
        tile: filled for `head_backward`; None where no gradient is needed, then nothing of size n * V is written.
        entropy: whether to compute it.

    Raises:
        ValueError: a shape, dtype, device or layout is wrong.
        RuntimeError: this CPU or build has no kernel for the dtype; see `unsupported_reason`.
    """
    bf16 = _check(x, weight, targets, bias, softcap, tile)
    rows = len(x)
    logp = torch.empty(rows)
    lse = torch.empty(rows)
    entropies = torch.empty(rows) if entropy else None
    if rows:
        targets, bias = targets.contiguous(), _vector(bias)
        _cpu.head_forward(
            _inputs(x, weight, targets, bias, softcap, logit_scale),
            bf16=bf16,
            logp=logp.data_ptr(),
            lse=lse.data_ptr(),
            entropy=_address(entropies),
            tile=_native(tile),
        )
    return RowLogprob(logp, lse, entropies)


def head_backward(
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    grad_x: Tensor | None = None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    overwrite_weight: bool = False,
) -> None:
    """Gradients of -Σ_i coefficients[i] * logp[i].

    The gradient by z = x Wᵀ + bias is g = coefficient * (softmax - onehot) * d logits / d z, made from a tile that
    `head_forward` filled with the same other arguments. The coefficient is applied in fp32, before g is rounded to the
    dtype of the products; these are summed in fp32. Runs with the same number of threads agree in every bit.

    Args:
        lse: [n] fp32, of `head_forward`.
        coefficients: [n], taken as fp32.
        grad_x: [n, H] fp32, overwritten with g W.
        grad_weight: [V, H] fp32, gᵀ x is added, or with `overwrite_weight` takes the place of what is there.
        grad_bias: [V] fp32 contiguous, Σ g is added.
        Any of the three may be None and is then not computed. The others are as for `head_forward`. Without rows
            nothing is touched.

    Raises:
        ValueError: a shape, dtype, device or layout is wrong.
        RuntimeError: this CPU or build has no kernel for the dtype; see `unsupported_reason`.
    """
    bf16 = _check(x, weight, targets, bias, softcap, tile)
    rows, vocab = len(x), len(weight)
    _check_vector("lse", lse, rows)
    _check_vector("coefficients", coefficients, rows)
    _check_gradient("grad_x", grad_x, x.shape)
    _check_gradient("grad_weight", grad_weight, weight.shape)
    _check_gradient("grad_bias", grad_bias, torch.Size([vocab]))
    if rows == 0 or (grad_x is None and grad_weight is None and grad_bias is None):
        return
    targets, bias = targets.contiguous(), _vector(bias)
    lse, coefficients = lse.detach().float().contiguous(), coefficients.detach().float().contiguous()
    _cpu.head_backward(
        _inputs(x, weight, targets, bias, softcap, logit_scale),
        bf16=bf16,
        tile=_native(tile),
        lse=lse.data_ptr(),
        coefficients=coefficients.data_ptr(),
        grad_x=_address(grad_x),
        grad_x_stride=0 if grad_x is None else grad_x.stride(0),
        grad_weight=_address(grad_weight),
        grad_weight_stride=0 if grad_weight is None else grad_weight.stride(0),
        grad_bias=_address(grad_bias),
        overwrites_weight=overwrite_weight,
    )


def _inputs(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> _cpu.HeadInputs:
    return _cpu.HeadInputs(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        targets=targets.data_ptr(),
        bias=_address(bias),
        rows=x.shape[0],
        hidden=x.shape[1],
        vocab=weight.shape[0],
        x_stride=x.stride(0),
        weight_stride=weight.stride(0),
        scale=logit_scale,
        softcap=0.0 if softcap is None else softcap,
        threads=torch.get_num_threads(),
    )


def _native(tile: Tile | None) -> _cpu.HeadTile:
    if tile is None:
        return _cpu.HeadTile(values=0, references=0, target_logp=0, target_derivative=0)
    return _cpu.HeadTile(
        values=tile.values.data_ptr(),
        references=tile.references.data_ptr(),
        target_logp=tile.target_logp.data_ptr(),
        target_derivative=tile.target_derivative.data_ptr(),
    )


def _check(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, tile: Tile | None
) -> bool:
    """Refuse what the kernel cannot run; whether it runs in bf16."""
    reason = unsupported_reason(x.dtype)
    if reason is not None:
        raise RuntimeError(f"the fused CPU head cannot run: {reason}")
    _check_matrix("x", x)
    _check_matrix("weight", weight)
    if weight.dtype != x.dtype:
        raise argument_error("weight", f"dtype {x.dtype}, as x", weight.dtype)
    if weight.shape[1] != x.shape[1]:
        raise argument_error("weight", f"shape [V, {x.shape[1]}], as x has {x.shape[1]} columns", tuple(weight.shape))
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise argument_error("weight", "shape [V, H] with V > 0 and H > 0", tuple(weight.shape))
    if targets.dtype != torch.int64:
        raise argument_error("targets", "dtype torch.int64", targets.dtype)
    _check_vector("targets", targets, len(x))
    if bias is not None:
        _check_vector("bias", bias, len(weight))
    if softcap is not None and not softcap > 0:
        raise argument_error("softcap", "a positive number or None", softcap)
    if tile is not None:
        _check_tile(tile, x, weight)
    return x.dtype == torch.bfloat16


def _check_tile(tile: Tile, x: Tensor, weight: Tensor) -> None:
    if not isinstance(tile, Tile):
        raise type_error("tile", "a Tile", tile)
    if tile.vocab != len(weight) or tile.max_rows < len(x) or tile.values.dtype != x.dtype:
        raise argument_error(
            "tile",
            f"one for {x.dtype}, {len(weight)} columns and at least {len(x)} rows",
            f"one for {tile.values.dtype}, {tile.vocab} columns and {tile.max_rows} rows",
        )


def _check_matrix(name: str, matrix: Tensor) -> None:
    _check_cpu(name, matrix)
    if matrix.ndim != 2:
        raise argument_error(name, "two dimensions", tuple(matrix.shape))
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise argument_error(name, "unit stride within a row", matrix.stride())


def _check_vector(name: str, vector: Tensor, size: int) -> None:
    _check_cpu(name, vector)
    if vector.shape != (size,):
        raise argument_error(name, f"shape [{size}]", tuple(vector.shape))


def _check_gradient(name: str, gradient: Tensor | None, shape: torch.Size) -> None:
    if gradient is None:
        return
    _check_cpu(name, gradient)
    if gradient.dtype != torch.float32:
        raise argument_error(name, "dtype torch.float32", gradient.dtype)
    if gradient.shape != shape:
        raise argument_error(name, f"shape {list(shape)}", tuple(gradient.shape))
    if shape[-1] > 1 and gradient.stride(-1) != 1:
        raise argument_error(name, "unit stride in the last dimension", gradient.stride())
    if gradient.ndim == 2 and shape[0] > 1 and gradient.stride(0) < shape[1]:
        raise argument_error(name, f"a row stride of at least {shape[1]}", gradient.stride(0))


def _check_cpu(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise argument_error(name, "a tensor on the CPU", tensor.device)


def _vector(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _blocks(vocab: int) -> int:
    return int(-(-vocab // _cpu.HEAD_VOCAB_BLOCK))
