"""Triton device functions for the first touch of a row: running maximum and sums, and what they come to.

Each lane keeps a running maximum m of the logits v it has seen, s = Σ e^{v − m} without the target, and, for the
entropy, t = Σ e^{v − m} (v − m) without the target. A vector lies in one thread, so the loop over a row needs no
barrier and no shuffle, and one exponential per element (and one per vector, for the old sum). Leaving the target out
keeps log p and p − 1 of a nearly certain target, where 1 − Σ of the others would have cancelled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robust_dpo.kernels.row_blocks import edge_columns, not_target
from robust_dpo.kernels.row_logits import exp, log1p, transform

# Where running maxima start: minus infinity for every finite logit, but its differences are never inf - inf. A row of
# -inf keeps it, with a sum of 0.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# e^d is 0 in fp32 long before; keeps 0 · d finite.
FAINT = tl.constexpr(-200.0)


@triton.jit
def sums_of_vectors(b_v: tl.tensor, b_max: tl.tensor, m_other: tl.tensor, ENTROPY: tl.constexpr) -> tl.tuple:
    """S and t of logits along axis 1, against one maximum per entry of axis 0."""
    b_d = b_v - b_max[:, None]
    b_e = tl.where(m_other, exp(b_d), 0.0)
    b_t = tl.zeros_like(b_max)
    if ENTROPY:
        b_t = tl.sum(b_e * tl.maximum(b_d, FAINT), 1)
    return tl.sum(b_e, 1), b_t


@triton.jit
def sums_for_maximum(b_max: tl.tensor, b_new: tl.tensor, b_s: tl.tensor, b_t: tl.tensor) -> tl.tuple:
    """From s and t against an old maximum m to those against a new one n: t becomes e^{m−n} (t + s (m − n))."""
    b_shift = tl.maximum(b_max - b_new, FAINT)
    b_decay = exp(b_shift)
    return b_s * b_decay, (b_t + b_s * b_shift) * b_decay


@triton.jit
def merge_statistics(b_m: tl.tensor, b_s: tl.tensor, b_t: tl.tensor) -> tl.tuple:
    """(m, s, t) of the union, from those of parts; the tree of the sum is fixed, so the bits are too."""
    m = tl.max(b_m, 0)
    b_s, b_t = sums_for_maximum(b_m, tl.zeros_like(b_m) + m, b_s, b_t)
    return m, tl.sum(b_s, 0), tl.sum(b_t, 0)


@triton.jit
def edge_statistics(
    p_row: tl.tensor,
    span: tl.tuple,
    head_of_model: tl.tuple,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    TRANSFORMED: tl.constexpr,
    ENTROPY: tl.constexpr,
) -> tl.tuple:
    """(m, s, t) that lanes begin with: all have the maximum of the edge, the first one its sums."""
    _head, _first_vec, _last_vec, _n_vec, _vocab, target, _is_read = span
    o_col, _m_col, m_col = edge_columns(span, VECTOR)
    b_z = tl.load(p_row + o_col, mask=m_col, other=0.0)
    b_v, _b_slope = transform(b_z, o_col, m_col, head_of_model, TRANSFORMED)
    b_v = tl.where(m_col, b_v, float("-inf"))[None, :]
    b_max = tl.maximum(tl.max(b_v, 1), LOWEST)
    b_s, b_t = sums_of_vectors(b_v, b_max, (o_col != target)[None, :], ENTROPY)
    m_first = tl.arange(0, LANES) == 0
    return tl.zeros([LANES], tl.float32) + b_max, tl.where(m_first, b_s, 0.0), tl.where(m_first, b_t, 0.0)


@triton.jit
def row_statistics(
    p_row: tl.tensor,
    span: tl.tuple,
    head_of_model: tl.tuple,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSFORMED: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVICTION: tl.constexpr,
) -> tl.tuple:
    """(m, s, t) of a span of a row; of one that is not read, nothing is loaded."""
    head, first_vec, last_vec, _n_vec, _vocab, target, is_read = span
    if ALIGNED:
        p_body = p_row
        b_m = tl.full([LANES], LOWEST, tl.float32)
        b_s = tl.zeros([LANES], tl.float32)
        b_t = tl.zeros([LANES], tl.float32)
    else:
        p_body = tl.multiple_of(p_row + head, 16)
        b_m, b_s, b_t = edge_statistics(p_row, span, head_of_model, VECTOR, LANES, TRANSFORMED, ENTROPY)
    o_lane = tl.arange(0, LANES)
    o_inner = tl.arange(0, VECTOR)[None, :]
    for i_vec in range(first_vec, tl.where(is_read, last_vec, first_vec), LANES):
        o_vec = i_vec + o_lane
        m_vec = o_vec < last_vec
        o = o_vec[:, None] * VECTOR + o_inner
        b_z = tl.load(p_body + o, mask=m_vec[:, None], other=0.0, eviction_policy=EVICTION)
        b_v, _b_slope = transform(b_z, head + o, m_vec[:, None], head_of_model, TRANSFORMED)
        # Selections per vector, not per element: behind the end v is 0, and e^{0 − inf} adds nothing.
        b_new = tl.where(m_vec, tl.maximum(b_m, tl.max(b_v, 1)), b_m)
        b_s, b_t = sums_for_maximum(b_m, b_new, b_s, b_t)
        b_against = tl.where(m_vec, b_new, float("inf"))
        s_add, t_add = sums_of_vectors(b_v, b_against, not_target(o_vec, o_inner, head, target, VECTOR), ENTROPY)
        b_s += s_add
        b_t += t_add
        b_m = b_new
    return merge_statistics(b_m, b_s, b_t)


@triton.jit
def finish(statistics: tl.tuple, v_target: tl.tensor, target: tl.tensor, is_read: tl.tensor) -> tl.tuple:
    """Of a whole row: logp, lse, entropy, and (m, 1 / Σ e^{v − m}, p(target) − 1) for the gradient.

    All but the last are 0 in a row that is not read, whose v_target is 0.
    """
    m, s, t = statistics
    m = tl.where(is_read, m, 0.0)
    s = tl.where(is_read, s, 1.0)
    inside = target >= 0
    d_target = v_target - m
    e_target = tl.where(inside, exp(d_target), 0.0)
    total = s + e_target
    is_likely = e_target > s
    odds = s / tl.where(is_likely, e_target, 1.0)
    log_total = tl.log(total)
    logp = tl.where(is_likely, -log1p(odds), d_target - log_total)
    t_total = t + tl.where(inside, e_target * tl.maximum(d_target, FAINT), 0.0)
    inverse = tl.where(is_read, 1 / total, 0.0)
    return logp, m + log_total, log_total - t_total / total, (m, inverse, -s / total)
