"""row_logprob in Triton for few long rows: several programs share a row.

The first launch takes the statistics of every segment, the second merges them, in the same order in every program of a
row, and writes its segment of the gradient. Nothing is exchanged but through the end of the first launch, and no sum
depends on which program is faster.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust_dpo.kernels.row_blocks import (
    LOWEST,
    finish,
    fold,
    load_target,
    row_head,
    row_start,
    row_statistics,
    transform,
    write_gradient,
)
from robust_dpo.kernels.row_launch import SPLIT_THREADS, RowForm, all_forms, launch, variant
from robust_dpo.kernels.triton_aot import Variant

# (m, s, t, z of the target) of a segment
PARTIALS = tl.constexpr(4)


@triton.jit
def span_of(
    head: tl.tensor,
    i_segment: tl.tensor,
    segment_vecs: tl.tensor,
    vocab: tl.tensor,
    target: tl.tensor,
    VECTOR: tl.constexpr,
) -> tl.tuple:
    """The span of one segment of a row; see `row_statistics`."""
    n_vec = (vocab - head) // VECTOR
    first_vec = i_segment * segment_vecs
    return head, first_vec, tl.minimum(first_vec + segment_vecs, n_vec), n_vec, vocab, target


@triton.jit(do_not_specialize=["vocab", "segments", "segment_vecs", "has_bias"])
def row_partials_kernel(
    p_logits: tl.tensor,
    p_targets: tl.tensor,
    p_bias: tl.tensor,
    p_partials: tl.tensor,
    stride: tl.int64,
    vocab: tl.tensor,
    segments: tl.tensor,
    segment_vecs: tl.tensor,
    logit_scale: tl.tensor,
    softcap: tl.tensor,
    has_bias: tl.tensor,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSFORMED: tl.constexpr,
    ENTROPY: tl.constexpr,
) -> None:
    """Statistics of one segment of a row -> p_partials [rows, segments, 4]."""
    i_row = (tl.program_id(0) // segments).to(tl.int64)
    i_segment = tl.program_id(0) % segments
    p_row = row_start(p_logits, i_row, stride, ALIGNED)
    target, z_target = load_target(p_row, p_targets + i_row, vocab)
    head = row_head(p_row, vocab, ALIGNED)
    span = span_of(head, i_segment, segment_vecs, vocab, target, VECTOR)
    head_of_model = (p_bias, has_bias, logit_scale, softcap)
    m, s, t = row_statistics(p_row, span, head_of_model, VECTOR, LANES, ALIGNED, TRANSFORMED, ENTROPY, "evict_last")
    p_partial = p_partials + (i_row * segments + i_segment) * PARTIALS
    tl.store(p_partial, m)
    tl.store(p_partial + 1, s)
    tl.store(p_partial + 2, t)
    tl.store(p_partial + 3, z_target)


@triton.jit(do_not_specialize=["vocab", "segments", "segment_vecs", "has_bias", "has_row_scale", "has_entropy"])
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
    vocab: tl.tensor,
    segments: tl.tensor,
    segment_vecs: tl.tensor,
    logit_scale: tl.tensor,
    softcap: tl.tensor,
    has_bias: tl.tensor,
    has_row_scale: tl.tensor,
    has_entropy: tl.tensor,
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
    m, s, t = fold(b_m, b_s, b_t)
    # Kept by the first launch: in place, another program may have overwritten the target's logit by now.
    z_target = tl.load(p_partials + i_row * segments * PARTIALS + 3)
    target = tl.load(p_targets + i_row)
    inside = (target >= 0) & (target < vocab)
    target = tl.where(inside, target, -1).to(vocab.dtype)
    head_of_model = (p_bias, has_bias, logit_scale, softcap)
    v_target, _ = transform(z_target, target, inside, head_of_model, TRANSFORMED)
    logp, lse, entropy, total, target_factor = finish(m, s, t, v_target, target)
    is_first = i_segment == 0
    tl.store(p_logp + i_row, logp, mask=is_first)
    tl.store(p_lse + i_row, lse, mask=is_first)
    tl.store(p_entropy + i_row, entropy, mask=is_first & (has_entropy != 0))
    if p_grad is not None:
        scale = tl.load(p_row_scale + i_row, mask=has_row_scale != 0, other=1.0) * logit_scale
        p_row = row_start(p_logits, i_row, stride, ALIGNED)
        p_grad_row = row_start(p_grad, i_row, grad_stride, ALIGNED)
        span = span_of(row_head(p_row, vocab, ALIGNED), i_segment, segment_vecs, vocab, target, VECTOR)
        result = (m, scale / total, scale * target_factor)
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
    vectors = triton.cdiv(vocab, form.vector)
    # Whole steps of the loop, so that only the last segment has an incomplete one.
    lanes = form.lanes(SPLIT_THREADS)
    segment_vecs = triton.cdiv(triton.cdiv(vectors, lanes), segments) * lanes
    segments = triton.cdiv(vectors, segment_vecs)
    partials = torch.empty(rows, segments, PARTIALS.value, dtype=torch.float32, device=logits.device)
    values = {
        **values,
        "p_partials": partials,
        "segments": segments,
        "segment_vecs": segment_vecs,
        "has_entropy": int(form.entropy),
    }
    launch(row_partials_kernel, rows * segments, form, SPLIT_THREADS, values)
    launch(row_merge_kernel, rows if form.grad is None else rows * segments, form, SPLIT_THREADS, values)


def aot_variants() -> list[Variant]:
    """Every variant that `launch_split` runs."""
    forms = [form for form in all_forms() if form.can_split]
    # The statistics do not depend on the gradient, nor the merge on the entropy.
    partials = [variant("row_partials", row_partials_kernel, form, SPLIT_THREADS) for form in forms if not form.grad]
    merges = [variant("row_merge", row_merge_kernel, form, SPLIT_THREADS) for form in forms if not form.entropy]
    return partials + merges
