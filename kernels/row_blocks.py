"""Triton device functions over one row of logits in blocks: where 16-byte loads lie, statistics, results, gradient.

A row is cut into up to VECTOR - 1 elements in front of the first 16-byte boundary, whole vectors of 16 bytes, and up
to VECTOR - 1 elements behind them. Vectors are a block of [LANES, VECTOR] whose mask is constant along a vector, so
that the compiler loads each in one instruction, whatever the vocabulary, the row stride and the base address (it is
told that they begin at multiples of 16 bytes); the two ends are one tiny block, the edge. Where it is known beforehand
that there is no edge (ALIGNED), it is left out.

Each lane keeps a running maximum m of the logits v it has seen, s = Σ e^{v − m} without the target, and, for the
entropy, t = Σ e^{v − m} (v − m) without the target. A vector lies in one thread, so the loop over a row needs no
barrier and no shuffle, and one exponential per element (and one per vector, for the old sum). Leaving the target out
keeps log p and p − 1 of a nearly certain target, where 1 − Σ of the others would have cancelled.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Where running maxima start: minus infinity for every finite logit, but its differences are never inf - inf. A row of
# -inf keeps it, with a sum of 0.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# e^d is 0 in fp32 long before; keeps 0 · d finite.
FAINT = tl.constexpr(-200.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(b_x: tl.tensor) -> tl.tensor:
    """e^x, 0 where it is below the normal numbers: a product and one instruction, where tl.exp takes three more."""
    return tl.exp2(b_x * LOG2_E)


@triton.jit
def row_start(p_matrix: tl.tensor, i_row: tl.tensor, stride: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """First element of a row; rows of ALIGNED matrices begin at multiples of 16 bytes."""
    p_row = p_matrix + i_row * stride
    return tl.multiple_of(p_row, 16) if ALIGNED else p_row


@triton.jit
def row_head(p_row: tl.tensor, vocab: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """Elements in front of the first 16-byte boundary of a row."""
    head = vocab * 0
    if not ALIGNED:
        ITEMSIZE: tl.constexpr = p_row.dtype.element_ty.primitive_bitwidth // 8
        to_boundary = (-p_row.to(tl.int64) & 15) // ITEMSIZE
        head = tl.minimum(to_boundary.to(vocab.dtype), vocab)
    return head


@triton.jit
def edge_columns(span: tl.tuple, VECTOR: tl.constexpr) -> tl.tuple:
    """Columns [2 · VECTOR] in front of and behind the whole vectors, and which of them there are.

    The edge belongs to the program that has the first vector.
    """
    head, first_vec, _last_vec, n_vec, vocab, _target = span
    o = tl.arange(0, 2 * VECTOR)
    o_col = tl.where(o < VECTOR, o, head + n_vec * VECTOR + o - VECTOR)
    m_col = tl.where(o < VECTOR, o < head, o_col < vocab)
    return o_col, m_col & (o * 0 + first_vec == 0)


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


@triton.jit
def load_target(
    p_row: tl.tensor,
    p_target: tl.tensor,
    vocab: tl.tensor,
) -> tl.tuple:
    """Column of the target, -1 where it lies outside of the vocabulary, and its value z, NaN there."""
    target = tl.load(p_target)
    inside = (target >= 0) & (target < vocab)
    z_target = tl.load(p_row + target, mask=inside, other=float("nan")).to(tl.float32)
    return tl.where(inside, target, -1).to(vocab.dtype), z_target


@triton.jit
def weigh(b_v: tl.tensor, b_max: tl.tensor, m_other: tl.tensor, ENTROPY: tl.constexpr) -> tl.tuple:
    """Terms of s and t of logits along axis 1, against one maximum per entry of axis 0."""
    b_d = b_v - b_max[:, None]
    b_e = tl.where(m_other, exp(b_d), 0.0)
    b_t = tl.zeros_like(b_max)
    if ENTROPY:
        b_t = tl.sum(b_e * tl.maximum(b_d, FAINT), 1)
    return tl.sum(b_e, 1), b_t


@triton.jit
def move(b_max: tl.tensor, b_new: tl.tensor, b_s: tl.tensor, b_t: tl.tensor) -> tl.tuple:
    """From s and t of an old maximum to those of a new one: Σ e^{v−n}(v − n) = e^{m−n} (t + s (m − n))."""
    b_shift = tl.maximum(b_max - b_new, FAINT)
    b_decay = exp(b_shift)
    return b_s * b_decay, (b_t + b_s * b_shift) * b_decay


@triton.jit
def not_target(
    o_vec: tl.tensor, o_inner: tl.tensor, head: tl.tensor, target: tl.tensor, VECTOR: tl.constexpr
) -> tl.tensor:
    """Which elements of vectors are not the target: a difference per vector, a comparison with a number per element."""
    o_target = (target - head) - o_vec * VECTOR
    return o_inner != o_target[:, None]


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
    _head, _first_vec, _last_vec, _n_vec, _vocab, target = span
    o_col, m_col = edge_columns(span, VECTOR)
    b_z = tl.load(p_row + o_col, mask=m_col, other=0.0)
    b_v, _b_slope = transform(b_z, o_col, m_col, head_of_model, TRANSFORMED)
    b_v = tl.where(m_col, b_v, float("-inf"))[None, :]
    b_max = tl.maximum(tl.max(b_v, 1), LOWEST)
    b_s, b_t = weigh(b_v, b_max, (o_col != target)[None, :], ENTROPY)
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
    """(m, s, t) of a span of a row: its vectors first_vec … last_vec − 1, and the edge if the first one is among them.

    Args:
        span: (head, first_vec, last_vec, n_vec, vocab, target), the last four of the whole row, but for last_vec.
    """
    head, first_vec, last_vec, _n_vec, _vocab, target = span
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
    for i_vec in range(first_vec, last_vec, LANES):
        o_vec = i_vec + o_lane
        m_vec = o_vec < last_vec
        o = o_vec[:, None] * VECTOR + o_inner
        b_z = tl.load(p_body + o, mask=m_vec[:, None], other=0.0, eviction_policy=EVICTION)
        b_v, _b_slope = transform(b_z, head + o, m_vec[:, None], head_of_model, TRANSFORMED)
        # Selections per vector, not per element: behind the end v is 0, and e^{0 − inf} adds nothing.
        b_new = tl.where(m_vec, tl.maximum(b_m, tl.max(b_v, 1)), b_m)
        b_s, b_t = move(b_m, b_new, b_s, b_t)
        b_against = tl.where(m_vec, b_new, float("inf"))
        s_add, t_add = weigh(b_v, b_against, not_target(o_vec, o_inner, head, target, VECTOR), ENTROPY)
        b_s += s_add
        b_t += t_add
        b_m = b_new
    return fold(b_m, b_s, b_t)


@triton.jit
def fold(b_m: tl.tensor, b_s: tl.tensor, b_t: tl.tensor) -> tl.tuple:
    """(m, s, t) of the union, from those of parts; the tree of the sum is fixed, so the bits are too."""
    m = tl.max(b_m, 0)
    b_s, b_t = move(b_m, tl.zeros_like(b_m) + m, b_s, b_t)
    return m, tl.sum(b_s, 0), tl.sum(b_t, 0)


@triton.jit
def finish(m: tl.tensor, s: tl.tensor, t: tl.tensor, v_target: tl.tensor, target: tl.tensor) -> tl.tuple:
    """Of a whole row: logp, lse, entropy, Σ e^{v − m} with the target, and p(target) − 1."""
    inside = target >= 0
    d_target = v_target - m
    e_target = tl.where(inside, exp(d_target), 0.0)
    total = s + e_target
    # log1p of the odds against the target, by the quotient log(u)/(u − 1) that cancels the rounding of u = 1 + odds.
    is_likely = e_target > s
    odds = s / tl.where(is_likely, e_target, 1.0)
    u = 1 + odds
    log1p = tl.where(u == 1, odds, tl.log(u) * (odds / tl.where(u == 1, 1.0, u - 1)))
    log_total = tl.log(total)
    logp = tl.where(is_likely, -log1p, d_target - log_total)
    t_total = t + tl.where(inside, e_target * tl.maximum(d_target, FAINT), 0.0)
    return logp, m + log_total, log_total - t_total / total, total, -s / total


@triton.jit
def gradient(
    b_z: tl.tensor,
    o_col: tl.tensor,
    m_col: tl.tensor,
    m_other: tl.tensor,
    head_of_model: tl.tuple,
    result: tl.tuple,
    TRANSFORMED: tl.constexpr,
) -> tl.tensor:
    """The factor · e^{v − m} · slope, and target_factor · slope at the target; result: (m, factor, target_factor)."""
    m, factor, target_factor = result
    b_v, b_slope = transform(b_z, o_col, m_col, head_of_model, TRANSFORMED)
    return tl.where(m_other, exp(b_v - m) * factor, target_factor) * b_slope


@triton.jit
def write_gradient(
    p_row: tl.tensor,
    p_grad_row: tl.tensor,
    span: tl.tuple,
    head_of_model: tl.tuple,
    result: tl.tuple,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE_STORE: tl.constexpr,
    TRANSFORMED: tl.constexpr,
) -> None:
    """Second touch of a span: its gradient, from the results of the whole row.

    A gradient narrower than the tile may lie over the front of the same row: element i of it covers bytes of tile
    elements ≤ i. So blocks go upwards, with a barrier between the loads of a block and its stores: then all loads of
    elements ≤ i, in every warp, are done when i is stored, and stores of earlier blocks never reach later loads. The
    edge is loaded first and stored last, behind another barrier, when all else has been loaded.

    A gradient of the tile's width overwrites only what the same thread, or a store that depends on its load, has read;
    then blocks go downwards, because the end of the row was touched last and is the likeliest to be in the cache still
    where the rows in flight do not all fit.
    """
    head, first_vec, last_vec, _n_vec, _vocab, target = span
    GRAD_TYPE: tl.constexpr = p_grad_row.dtype.element_ty
    NARROWED: tl.constexpr = GRAD_TYPE.primitive_bitwidth < p_row.dtype.element_ty.primitive_bitwidth
    if ALIGNED:
        p_body = p_row
        p_grad_body = p_grad_row
    else:
        p_body = tl.multiple_of(p_row + head, 16)
        p_grad_body = p_grad_row + head
        if WIDE_STORE:
            p_grad_body = tl.multiple_of(p_grad_body, 16)
        o_edge, m_edge = edge_columns(span, VECTOR)
        b_edge = tl.load(p_row + o_edge, mask=m_edge, other=0.0)
    o_lane = tl.arange(0, LANES)
    o_inner = tl.arange(0, VECTOR)[None, :]
    steps = tl.cdiv(last_vec - first_vec, LANES)
    for i in range(0, steps):
        i_step = i if NARROWED else steps - 1 - i
        o_vec = first_vec + i_step * LANES + o_lane
        m_vec = (o_vec < last_vec)[:, None]
        o = o_vec[:, None] * VECTOR + o_inner
        b_z = tl.load(p_body + o, mask=m_vec, other=0.0, eviction_policy="evict_first")
        if NARROWED:
            tl.debug_barrier()
        m_other = not_target(o_vec, o_inner, head, target, VECTOR)
        b_g = gradient(b_z, head + o, m_vec, m_other, head_of_model, result, TRANSFORMED)
        tl.store(p_grad_body + o, b_g.to(GRAD_TYPE), mask=m_vec)
    if not ALIGNED:
        if NARROWED:
            tl.debug_barrier()
        g_edge = gradient(b_edge, o_edge, m_edge, o_edge != target, head_of_model, result, TRANSFORMED)
        tl.store(p_grad_row + o_edge, g_edge.to(GRAD_TYPE), mask=m_edge)
