"""row_logprob in Triton for few long rows: several programs share a row.

The first launch takes the statistics of every segment, the second merges them, in the same order in every program of a
row, and writes its segment of the gradient. Nothing is exchanged but through the end of the first launch, and no sum
depends on which program is faster.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton.language as tl
from torch import Tensor

from robust_dpo.kernels.row_blocks import load_target_logit, locate_target, row_start, span_of
from robust_dpo.kernels.row_gradient import write_gradient
from robust_dpo.kernels.row_launch import SPLIT_THREADS, RowForm, all_forms, launch, row_jit, segments_of, variant
from robust_dpo.kernels.row_logits import transform
from robust_dpo.kernels.row_statistics import LOWEST, finish, merge_statistics, row_statistics
from robust_dpo.kernels.triton_aot import Variant

# (m, s, t, z of the target) of a segment
PARTIALS = tl.constexpr(4)


@row_jit
def row_partials_kernel(
    p_logits: tl.tensor,
    p_targets: tl.tensor,
    p_bias: tl.tensor,
    p_partials: tl.tensor,
    stride: tl.int64,
    vocab: tl.int32,
    segments: tl.int32,
    segment_vecs: tl.int32,
    logit_scale: tl.float32,
    softcap: tl.float32,
    has_bias: tl.int32,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSFORMED: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVICTION: tl.constexpr,
) -> None:
    """Statistics of one segment of a row -> p_partials [rows, segments, 4]."""
    i_row = (tl.program_id(0) // segments).to(tl.int64)
    i_segment = tl.program_id(0) % segments
    p_row = row_start(p_logits, i_row, stride, ALIGNED)
    target, is_read = locate_target(p_targets + i_row, vocab)
    z_target = load_target_logit(p_row, target, is_read)
    span = span_of(p_row, i_segment, segment_vecs, vocab, target, is_read, VECTOR, ALIGNED)
    head_of_model = (p_bias, has_bias, logit_scale, softcap)
    m, s, t = row_statistics(p_row, span, head_of_model, VECTOR, LANES, ALIGNED, TRANSFORMED, ENTROPY, EVICTION)
    p_partial = p_partials + (i_row * segments + i_segment) * PARTIALS
    tl.store(p_partial, m)
    tl.store(p_partial + 1, s)
    tl.store(p_partial + 2, t)
    tl.store(p_partial + 3, z_target)


@row_jit
def row_merge_kernel(
    p_logits: tl.tensor,
    p_targets: tl.tensor,
    p_bias: tl.tensor,
    p_row_scale: tl.tensor,
    p_partials: tl.tensor,
    p_logp: tl.tensor,
    p_lse: tl.tensor,
    p_entropy: tl.tensor,
    p_grad: tl.tensor,
    stride: tl.int64,
    grad_stride: tl.int64,
    vocab: tl.int32,
    segments: tl.int32,
    segment_vecs: tl.int32,
    logit_scale: tl.float32,
    softcap: tl.float32,
    has_bias: tl.int32,
    has_row_scale: tl.int32,
    has_entropy: tl.int32,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSFORMED: tl.constexpr,
    SEGMENTS: tl.constexpr,
) -> None:
    """Results of a row from its partials, and one segment of its gradient; without one, one program takes a row."""
    programs = segments
    if p_grad is None:
        programs = 1
    i_row = (tl.program_id(0) // programs).to(tl.int64)
    i_segment = tl.program_id(0) % programs
    o_segment = tl.arange(0, SEGMENTS)
    m_segment = o_segment < segments
    p_partial = p_partials + (i_row * segments + o_segment) * PARTIALS
    b_m = tl.load(p_partial, mask=m_segment, other=LOWEST)
    b_s = tl.load(p_partial + 1, mask=m_segment, other=0.0)
    b_t = tl.load(p_partial + 2, mask=m_segment, other=0.0)
    statistics = merge_statistics(b_m, b_s, b_t)
    # Kept by the first launch: in place, another program may have overwritten the target's logit by now.
    z_target = tl.load(p_partials + i_row * segments * PARTIALS + 3)
    target, is_read = locate_target(p_targets + i_row, vocab)
    head_of_model = (p_bias, has_bias, logit_scale, softcap)
    v_target, _ = transform(z_target, target, target >= 0, head_of_model, TRANSFORMED)
    logp, lse, entropy, for_gradient = finish(statistics, v_target, target, is_read)
    is_first = i_segment == 0
    tl.store(p_logp + i_row, logp, mask=is_first)
    tl.store(p_lse + i_row, lse, mask=is_first)
    tl.store(p_entropy + i_row, entropy, mask=is_first & (has_entropy != 0))
    if p_grad is not None:
        m, inverse, target_factor = for_gradient
        scale = tl.load(p_row_scale + i_row, mask=is_read & (has_row_scale != 0), other=1.0) * logit_scale
        p_row = row_start(p_logits, i_row, stride, ALIGNED)
        p_grad_row = row_start(p_grad, i_row, grad_stride, ALIGNED)
        span = span_of(p_row, i_segment, segment_vecs, vocab, target, is_read, VECTOR, ALIGNED)
        result = (m, scale * inverse, scale * target_factor)
        write_gradient(p_row, p_grad_row, span, head_of_model, result, VECTOR, LANES, ALIGNED, True, TRANSFORMED)


def launch_split(form: RowForm, segments: int, logits: Tensor, values: Mapping[str, object]) -> None:
    """row_logprob of `logits`, each row by up to `segments` programs.

    Args:
        form: one that `can_split`.
        segments: at most 64.
        logits: [n, V].
        values: runtime parameters of `row_logprob_kernel`, by name.
    """
    rows, vocab = logits.shape
    segments, segment_vecs = segments_of(vocab, segments, form, SPLIT_THREADS)
    partials = torch.empty(rows, segments, PARTIALS.value, dtype=torch.float32, device=logits.device)
    values = {
        **values,
        "p_partials": partials,
        "segments": segments,
        "segment_vecs": segment_vecs,
        "has_entropy": int(form.entropy),
    }
    launch(row_partials_kernel, rows * segments, form, SPLIT_THREADS, logits.device, values)
    launch(row_merge_kernel, rows if form.grad is None else rows * segments, form, SPLIT_THREADS, logits.device, values)


def aot_variants() -> list[Variant]:
    """Every variant that `launch_split` runs."""
    merges = [form for form in all_forms() if form.can_split and not form.entropy]
    # What the statistics depend on of a gradient is whether there is one; the merge does not depend on the entropy.
    partials = {
        (form.tile, form.aligned, form.transformed, form.entropy, form.eviction): form
        for form in all_forms()
        if form.can_split
    }
    return [
        *(variant("row_partials", row_partials_kernel, form, SPLIT_THREADS) for form in partials.values()),
        *(variant("row_merge", row_merge_kernel, form, SPLIT_THREADS) for form in merges),
    ]
