"""Triton device functions that say where the elements of a row lie, so that they are read 16 bytes at a time.

A row is cut into up to VECTOR - 1 elements in front of the first 16-byte boundary, whole vectors of 16 bytes, and up
to VECTOR - 1 elements behind them. Vectors are a block of [LANES, VECTOR] whose mask is constant along a vector, so
that the compiler loads each in one instruction, whatever the vocabulary, the row stride and the base address (it is
told that they begin at multiples of 16 bytes); the two ends are one tiny block, the edge. Where it is known beforehand
that there is no edge (ALIGNED), it is left out.

A span is what one program takes of a row: (head, first_vec, last_vec, n_vec, vocab, target, is_read), its vectors
first_vec … last_vec − 1 of the n_vec, and the edge if the first vector is among them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robust_dpo.kernels.row_logprob import IGNORE_INDEX

_IGNORE_INDEX = tl.constexpr(IGNORE_INDEX)


@triton.jit
def row_start(p_matrix: tl.tensor, i_row: tl.tensor, stride: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """First element of a row; rows of ALIGNED matrices begin at multiples of 16 bytes."""
    p_row = p_matrix + i_row * stride
    return tl.multiple_of(p_row, 16) if ALIGNED else p_row


@triton.jit
def locate_target(p_target: tl.tensor, vocab: tl.tensor) -> tl.tuple:
    """Column of the target, -1 where it lies outside of the vocabulary, and whether the row is to be read."""
    target = tl.load(p_target)
    inside = (target >= 0) & (target < vocab)
    return tl.where(inside, target, -1).to(vocab.dtype), target != _IGNORE_INDEX


@triton.jit
def load_target_logit(p_row: tl.tensor, target: tl.tensor, is_read: tl.tensor) -> tl.tensor:
    """Z of the target: NaN where it lies outside of the vocabulary, 0 in rows that are not read."""
    z_target = tl.load(p_row + target, mask=target >= 0, other=float("nan")).to(tl.float32)
    return tl.where(is_read, z_target, 0.0)


@triton.jit
def span_of(
    p_row: tl.tensor,
    i_segment: tl.tensor,
    segment_vecs: tl.tensor,
    vocab: tl.tensor,
    target: tl.tensor,
    is_read: tl.tensor,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tuple:
    """The span of one segment of `segment_vecs` vectors of a row."""
    head = vocab * 0
    if not ALIGNED:
        ITEMSIZE: tl.constexpr = p_row.dtype.element_ty.primitive_bitwidth // 8
        to_boundary = (-p_row.to(tl.int64) & 15) // ITEMSIZE
        head = tl.minimum(to_boundary.to(vocab.dtype), vocab)
    n_vec = (vocab - head) // VECTOR
    first_vec = i_segment * segment_vecs
    return head, first_vec, tl.minimum(first_vec + segment_vecs, n_vec), n_vec, vocab, target, is_read


@triton.jit
def edge_columns(span: tl.tuple, VECTOR: tl.constexpr) -> tl.tuple:
    """Columns [2 · VECTOR] in front of and behind the whole vectors, which of them there are, and which are to be read.

    The edge belongs to the program that has the first vector.
    """
    head, first_vec, _last_vec, n_vec, vocab, _target, is_read = span
    o = tl.arange(0, 2 * VECTOR)
    o_col = tl.where(o < VECTOR, o, head + n_vec * VECTOR + o - VECTOR)
    m_col = tl.where(o < VECTOR, o < head, o_col < vocab)
    m_col = m_col & (o * 0 + first_vec == 0)
    return o_col, m_col, m_col & (o_col < tl.where(is_read, vocab, 0))


@triton.jit
def not_target(
    o_vec: tl.tensor, o_inner: tl.tensor, head: tl.tensor, target: tl.tensor, VECTOR: tl.constexpr
) -> tl.tensor:
    """Which elements of vectors are not the target: a difference per vector, a comparison with a number per element."""
    o_target = (target - head) - o_vec * VECTOR
    return o_inner != o_target[:, None]
