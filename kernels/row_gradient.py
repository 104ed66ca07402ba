"""Triton device functions that write the gradient of a row, from its logits and its results."""

from __future__ import annotations

import triton
import triton.language as tl

from robust_dpo.kernels.row_blocks import edge_columns, not_target
from robust_dpo.kernels.row_logits import exp, transform


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
    """The gradient of a span, from the results of the whole row; zeros, without a load, where it is not read.

    A gradient narrower than the tile may lie over the front of the same row: element i of it covers bytes of tile
    elements ≤ i. So blocks go upwards, with a barrier between the loads of a block and its stores: then all loads of
    elements ≤ i, in every warp, are done when i is stored, and stores of earlier blocks never reach later loads. The
    edge is loaded first and stored last, behind another barrier, when all else has been loaded.

    A gradient of the tile's width overwrites only what the same thread, or a store that depends on its load, has read;
    then blocks go downwards, because the end of the row was touched last and is the likeliest to be in the cache still.
    """
    head, first_vec, last_vec, _n_vec, _vocab, target, is_read = span
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
        o_edge, m_edge, m_edge_load = edge_columns(span, VECTOR)
        b_edge = tl.load(p_row + o_edge, mask=m_edge_load, other=0.0)
    o_lane = tl.arange(0, LANES)
    o_inner = tl.arange(0, VECTOR)[None, :]
    # What is loaded ends here, what is stored at last_vec: a row that is not read is all zeros, and its factor is 0.
    end_of_loads = tl.where(is_read, last_vec, first_vec)
    steps = tl.cdiv(last_vec - first_vec, LANES)
    for i in range(0, steps):
        i_step = i if NARROWED else steps - 1 - i
        o_vec = first_vec + i_step * LANES + o_lane
        m_load = (o_vec < end_of_loads)[:, None]
        o = o_vec[:, None] * VECTOR + o_inner
        b_z = tl.load(p_body + o, mask=m_load, other=0.0, eviction_policy="evict_first")
        if NARROWED:
            tl.debug_barrier()
        m_other = not_target(o_vec, o_inner, head, target, VECTOR)
        b_g = gradient(b_z, head + o, m_load, m_other, head_of_model, result, TRANSFORMED)
        tl.store(p_grad_body + o, b_g.to(GRAD_TYPE), mask=(o_vec < last_vec)[:, None])
    if not ALIGNED:
        if NARROWED:
            tl.debug_barrier()
        g_edge = gradient(b_edge, o_edge, m_edge_load, o_edge != target, head_of_model, result, TRANSFORMED)
        tl.store(p_grad_row + o_edge, g_edge.to(GRAD_TYPE), mask=m_edge)
