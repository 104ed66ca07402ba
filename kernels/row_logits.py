"""Triton device functions for single logits: what the model's head does to them, and exact exponentials."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(b_x: tl.tensor) -> tl.tensor:
    """e^x, 0 where it is below the normal numbers: a product and one instruction, where tl.exp takes three more."""
    return tl.exp2(b_x * LOG2_E)


@triton.jit
def log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) of x ≥ 0, by the quotient log(u)/(u − 1), which cancels the rounding of u = 1 + x."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def expm1(x: tl.tensor) -> tl.tensor:
    """e^x − 1 of x ≤ 0: near 0, where the difference would cancel, by the quotient of `log1p`, with u = e^x."""
    u = tl.exp(x)
    cancels = (u > 0.5) & (u != 1)
    near = (u - 1) * (x / tl.log(tl.where(cancels, u, 2.0)))
    return tl.where(u == 1, x, tl.where(cancels, near, u - 1))


@triton.jit
def tanh(b_x: tl.tensor) -> tl.tuple:
    """(tanh x, 1 − tanh² x) through d = e^{−2|x|}: nothing overflows, and 1 − tanh² = 4d/(1 + d)² keeps its digits.

    Below 0.625, where 1 − 2d/(1 + d) would cancel, tanh is an odd minimax polynomial, that of
    csrc/row_logprob_kernel.h (relative error 4.4e-9 before rounding).
    """
    b_size = tl.abs(b_x)
    b_decay = exp(-2 * b_size)
    b_inverse = 1 / (1 + b_decay)
    b_large = 1 - 2 * b_decay * b_inverse
    b_square = b_x * b_x
    b_p = -5.7049864e-3 * b_square + 2.0639086e-2
    b_p = b_p * b_square - 5.3739715e-2
    b_p = b_p * b_square + 1.3331442e-1
    b_p = b_p * b_square - 3.3333281e-1
    b_small = b_x * b_square * b_p + b_x
    b_tanh = tl.where(b_size < 0.625, b_small, tl.where(b_x < 0, -b_large, b_large))
    return b_tanh, 4 * b_decay * b_inverse * b_inverse


@triton.jit
def transform(
    b_z: tl.tensor,
    o_col: tl.tensor,
    m_col: tl.tensor,
    head_of_model: tl.tuple,
    TRANSFORMED: tl.constexpr,
) -> tl.tuple:
    """Logits v of the tile's values z, and dv/dz / logit_scale.

    Args:
        head_of_model: (p_bias, has_bias, logit_scale, softcap); without TRANSFORMED only the scale counts. softcap 0:
            none.
    """
    p_bias, has_bias, logit_scale, softcap = head_of_model
    b_v = b_z.to(tl.float32)
    if TRANSFORMED:
        b_bias = tl.load(p_bias + o_col, mask=tl.where(m_col, has_bias, 0) != 0, other=0.0)
        b_v = (b_v + b_bias) * logit_scale
        b_slope = tl.zeros_like(b_v) + 1.0
        if softcap > 0:
            b_tanh, b_slope = tanh(b_v * (1 / softcap))
            b_v = softcap * b_tanh
        return b_v, b_slope
    else:
        return b_v * logit_scale, 1.0
