"""group_epilogue in Triton: one launch from token log-probs to the coefficients of the rows.

One program for each group sums its log-probs and solves its loss. The last program to finish takes the groups' scores
together. Everything behind the sums is fp64, in a fixed order.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust_dpo.errors import argument_error
from robust_dpo.kernels.group_epilogue import EpilogueVectors, NativeLoss, check_arguments, has_loss, option_values
from robust_dpo.kernels.group_losses_triton import LOSS_KERNELS, GroupBlock
from robust_dpo.kernels.group_weights_triton import (
    ARGUMENTS,
    CACHED,
    CALIBRATION,
    COUNTED,
    LIVE,
    MAX_WIDTH,
    ROWS,
    SCORES,
    TILT,
    ChunkPointers,
    advance,
    epilogue_jit,
    launch_shape,
    row_coefficients_kernel,
    where_present,
    write_rows,
)
from robust_dpo.kernels.triton_aot import Variant
from robust_dpo.losses import BoundLoss

# Name -> options of the losses.
_OPTIONS = {name: kernel.options for name, kernel in LOSS_KERNELS.items()}
# What the last program writes alone takes a latency (0.7 µs) for every 2,048 rows, one multiprocessor's 100 GB/s a
# tenth of that. Beyond 8,192 rows that exceeds the 3 µs of a second launch, which spreads the rows over the device.
ROWS_OF_LAST_PROGRAM = 8192


@triton.jit
def _segment_sums(
    p_tokens: tl.tensor,
    p_ref_tokens: tl.tensor,
    p_counted: tl.tensor,
    present: tl.tensor,
    b_start: tl.tensor,
    b_count: tl.tensor,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tuple:
    """[K] fp64 sums of the counted log-probs of K responses, policy and reference."""
    b_sum = tl.zeros([K, TOKENS], tl.float64)
    b_ref_sum = tl.zeros([K, TOKENS], tl.float64)
    longest = tl.max(b_count, 0)
    for o_block in range(0, longest, TOKENS):
        o_token = o_block + tl.arange(0, TOKENS)[None, :]
        o_row = b_start[:, None] + o_token
        m_row = o_token < b_count[:, None]
        # Three independent loads: waiting for `counted` first would double the latency.
        b_counted = tl.load(p_counted + o_row, where_present(m_row, present, COUNTED), other=1)
        b_logp = tl.load(p_tokens + o_row, m_row, other=0.0)
        b_ref_logp = tl.load(p_ref_tokens + o_row, where_present(m_row, present, LIVE), other=0.0)
        b_sum += tl.where(b_counted != 0, b_logp, 0.0).to(tl.float64)
        b_ref_sum += tl.where(b_counted != 0, b_ref_logp, 0.0).to(tl.float64)
    return tl.sum(b_sum, 1), tl.sum(b_ref_sum, 1)


@epilogue_jit
def group_epilogue_kernel(
    p_tokens: tl.tensor,
    p_ref_tokens: tl.tensor,
    p_counted: tl.tensor,
    p_seq_offsets: tl.tensor,
    p_group_offsets: tl.tensor,
    p_lengths: tl.tensor,
    p_scores: tl.tensor,
    p_calibration: tl.tensor,
    p_logps: tl.tensor,
    p_ref_logps: tl.tensor,
    p_losses: tl.tensor,
    p_derivative: tl.tensor,
    p_coefficients: tl.tensor,
    p_state: tl.tensor,
    p_counter: tl.tensor,
    first_group: tl.int64,
    last_group: tl.int64,
    present: tl.int32,
    temperature: tl.float64,
    first: tl.float64,
    second: tl.float64,
    LOSS: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
) -> None:
    i_group = first_group + tl.program_id(0)
    o_first = tl.load(p_group_offsets + i_group)
    size = tl.load(p_group_offsets + i_group + 1) - o_first
    o_slot = tl.arange(0, K)
    m_response = o_slot < size
    o_response = o_first + o_slot
    b_start = tl.load(p_seq_offsets + o_response, m_response, other=0)
    b_count = tl.load(p_seq_offsets + o_response + 1, m_response, other=0) - b_start
    b_length = tl.load(p_lengths + o_response, m_response, other=1.0).to(tl.float64)
    m_cached = where_present(m_response, present, CACHED)
    b_cached = tl.load(p_ref_logps + o_response, m_cached, other=0.0).to(tl.float64)
    b_score = tl.load(p_scores + o_response, where_present(m_response, present, SCORES), other=0.0).to(tl.float64)
    b_quality = tl.where((present & SCORES) != 0, b_score, -o_slot.to(tl.float64))

    b_logp, b_ref = _segment_sums(p_tokens, p_ref_tokens, p_counted, present, b_start, b_count, K, TOKENS)
    tl.store(p_logps + o_response, b_logp.to(tl.float32), m_response)
    tl.store(p_ref_logps + o_response, b_ref.to(tl.float32), where_present(m_response, present, LIVE))

    m_pair = m_response[:, None] & m_response[None, :]
    m_better = m_pair & (b_quality[:, None] > b_quality[None, :])
    m_tied = m_pair & (b_quality[:, None] == b_quality[None, :])
    m_before = m_better | (m_tied & (o_slot[:, None] < o_slot[None, :]))
    group = GroupBlock(
        b_logp, b_ref + b_cached, b_length, b_quality, m_response, m_better, m_before, size.to(tl.float64)
    )
    loss, b_derivative = LOSS(group, first, second)
    tl.store(p_losses + i_group, loss.to(tl.float32))
    tl.store(p_derivative + o_response, b_derivative.to(tl.float32), m_response)

    if (present & TILT) != 0:
        # All threads have stored when one of them announces it (release), and who sees all announcements (acquire)
        # sees what was stored before them.
        tl.debug_barrier()
        arrived = tl.atomic_add(p_counter, 1, sem="acq_rel")
        if arrived == tl.num_programs(0) - 1:
            tl.store(p_counter, 0)  # for the next launch
            chunk = ChunkPointers(
                p_counted,
                p_seq_offsets,
                p_group_offsets,
                p_calibration,
                p_losses,
                p_derivative,
                p_coefficients,
                p_state,
                present,
                temperature,
            )
            shift = advance(chunk, first_group, last_group)
            if (present & ROWS) != 0:
                for i_tile in range(first_group, last_group, TILE_GROUPS):
                    write_rows(chunk, i_tile, last_group, shift, TILE_GROUPS, K, TILE_TOKENS)


def supports(loss: BoundLoss, widest: int) -> bool:
    """Whether the kernel has this loss, for groups of up to `widest` responses."""
    return widest <= MAX_WIDTH and has_loss(_OPTIONS, loss)


def group_epilogue(
    vectors: EpilogueVectors, loss: NativeLoss, temperature: float | None, first_group: int, last_group: int
) -> None:
    """From token log-probs to the coefficients of a chunk's rows; see `GroupEpilogueLauncher`."""
    check_arguments(vectors, temperature, first_group, last_group)
    first, second = option_values(_OPTIONS, loss)
    if vectors.widest > MAX_WIDTH:
        raise argument_error("vectors.widest", f"at most {MAX_WIDTH} responses in a group", vectors.widest)
    v, groups = vectors, last_group - first_group
    if groups == 0:
        if v.state is not None and temperature is not None:
            v.state[2] = 1.0
        return
    kernel = LOSS_KERNELS[loss.name]
    # The rows of the chunk are counted on the device only; their share of the batch is near enough to choose by.
    few_rows = len(v.token_logps) * groups <= ROWS_OF_LAST_PROGRAM * len(v.losses)
    facts = {
        LIVE: v.ref_token_logps is not None,
        CACHED: v.ref_logps is not None and v.ref_token_logps is None,
        COUNTED: v.counted is not None,
        SCORES: v.scores is not None,
        CALIBRATION: v.calibration is not None,
        TILT: temperature is not None,
        ROWS: temperature is not None and few_rows,
    }
    present = sum(bit.value for bit, holds in facts.items() if holds)
    # What is absent is never read; the pointer only has to have the type.
    absent = v.logps
    counted = (absent if v.counted is None else v.counted).view(torch.uint8)
    calibration = absent if v.calibration is None else v.calibration
    coefficients = absent if v.coefficients is None else v.coefficients
    state = v.seq_offsets.view(torch.float64) if v.state is None else v.state
    t = 1.0 if temperature is None else temperature
    width = max(2, triton.next_power_of_2(v.widest))
    shape = launch_shape(width)
    options = {"num_warps": shape.warps, "enable_fp_fusion": True}
    with torch.cuda.device(v.logps.device) if v.logps.is_cuda else nullcontext():
        group_epilogue_kernel[(groups,)](
            v.token_logps,
            absent if v.ref_token_logps is None else v.ref_token_logps,
            counted,
            v.seq_offsets,
            v.group_offsets,
            v.lengths,
            absent if v.scores is None else v.scores.float(),
            calibration,
            v.logps,
            absent if v.ref_logps is None else v.ref_logps,
            v.losses,
            v.derivative,
            coefficients,
            state,
            _counter(v.logps.device),
            first_group,
            last_group,
            present,
            t,
            first,
            second,
            LOSS=kernel.function,
            K=width,
            TOKENS=shape.tokens,
            TILE_GROUPS=shape.tile_groups,
            TILE_TOKENS=shape.tile_tokens,
            **options,
        )
        if temperature is not None and not few_rows:
            row_coefficients_kernel[(groups,)](
                counted,
                v.seq_offsets,
                v.group_offsets,
                calibration,
                v.losses,
                v.derivative,
                coefficients,
                state,
                first_group,
                present,
                t,
                K=width,
                TOKENS=shape.tokens,
                **options,
            )


def _counter(device: torch.device) -> Tensor:
    """[1] int32, programs of the launch that are done; zero between launches."""
    if device.type != "cuda":
        return _counter_of_stream(device, 0)
    if torch.cuda.is_current_stream_capturing():
        # A graph may be replayed beside anything else, so it has its own, which its every replay sets to zero.
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _counter_of_stream(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _counter_of_stream(device: torch.device, stream: int) -> Tensor:
    """Launches on one stream follow one another, so they share a counter, and no launch has to fill it first."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def aot_variants() -> list[Variant]:
    """Every loss and padded size of a group. Loads are 4 bytes wide, since responses begin anywhere, so none is hot."""
    found = []
    for width in (1 << bit for bit in range(1, MAX_WIDTH.bit_length())):
        shape = launch_shape(width)
        cut = {
            "K": width,
            "TOKENS": shape.tokens,
            "TILE_GROUPS": shape.tile_groups,
            "TILE_TOKENS": shape.tile_tokens,
        }
        options = {"num_warps": shape.warps}
        for name, loss in LOSS_KERNELS.items():
            constants = {"LOSS": loss.function, **cut}
            variant = Variant(
                f"{name} K={width}", group_epilogue_kernel, ARGUMENTS, constants, frozenset(), options, hot=False
            )
            found.append(variant)
    return found
