"""What the groups of a chunk weigh, in Triton: their scores, the running normaliser, the coefficients of their rows.

group_epilogue calls the functions here at its end. For chunks of many rows the coefficients are a launch of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from robust_dpo.kernels.group_epilogue import HEADROOM
from robust_dpo.kernels.triton_aot import Variant

# Bits of `present`: what is there, and what is to be done. The sets of them are no constexprs, because a masked load
# costs nothing and the combinations would multiply the variants by 64.
LIVE, CACHED, COUNTED, SCORES, CALIBRATION, TILT, ROWS = (tl.constexpr(1 << bit) for bit in range(7))
_HEADROOM = tl.constexpr(HEADROOM)
_LARGEST = tl.constexpr(torch.finfo(torch.float64).max)
# Groups whose scores the last program takes together.
_SCORE_BLOCK = tl.constexpr(512)

MAX_WIDTH = 64
ARGUMENTS = {
    "p_tokens": "*fp32",
    "p_ref_tokens": "*fp32",
    "p_counted": "*u8",
    "p_seq_offsets": "*i64",
    "p_group_offsets": "*i64",
    "p_lengths": "*fp32",
    "p_scores": "*fp32",
    "p_calibration": "*fp32",
    "p_logps": "*fp32",
    "p_ref_logps": "*fp32",
    "p_losses": "*fp32",
    "p_derivative": "*fp32",
    "p_coefficients": "*fp32",
    "p_state": "*fp64",
    "p_counter": "*i32",
    "first_group": "i64",
    "last_group": "i64",
    "present": "i32",
    "temperature": "fp64",
    "first": "fp64",
    "second": "fp64",
}
# Numbers differ in every launch, and responses begin anywhere: to compile for some of either would help nobody.
epilogue_jit = triton.jit(do_not_specialize=[*ARGUMENTS], do_not_specialize_on_alignment=[*ARGUMENTS])


class LaunchShape(NamedTuple):
    """How work is cut, by the padded size of a group.

    Args:
        warps: of a program.
        tokens: of each response of a group that are taken at once.
        tile_groups: that the last program writes the rows of together.
        tile_tokens: of each of their responses.
    """

    warps: int
    tokens: int
    tile_groups: int
    tile_tokens: int


def launch_shape(width: int) -> LaunchShape:
    """The shape for groups padded to `width` responses, a power of two up to MAX_WIDTH."""
    # There are fewer programs than multiprocessors, and each waits for memory most of the time: many threads with few
    # elements each. 4 log-probs of both models for each of 256 threads, in fp64, are what fits into their registers
    # beside the 64-bit offsets; so are the [64, 64] pairs of the widest groups with 512 threads.
    warps = 16 if width >= 32 else 8
    return LaunchShape(warps, 128 * warps // width, MAX_WIDTH // width, 2048 // MAX_WIDTH)


class ChunkPointers(NamedTuple):
    """What turns the solved groups of a chunk into weights; the pointers are those of `EpilogueVectors`.

    Args:
        present: bits.
        temperature: t.
    """

    counted: tl.tensor
    seq_offsets: tl.tensor
    group_offsets: tl.tensor
    calibration: tl.tensor
    losses: tl.tensor
    derivative: tl.tensor
    coefficients: tl.tensor
    state: tl.tensor
    present: tl.tensor
    temperature: tl.tensor


@triton.jit
def where_present(m_x: tl.tensor, present: tl.tensor, BIT: tl.constexpr) -> tl.tensor:
    """A mask that is False everywhere without the bit."""
    return tl.where(m_x, present & BIT, 0) != 0


@triton.jit
def _tilt(p: ChunkPointers, o_group: tl.tensor, m_group: tl.tensor) -> tl.tuple:
    """Scores s = hℓ/t of some groups, and h. ℓ is what was stored, so that all who normalise by the losses agree."""
    b_loss = tl.load(p.losses + o_group, m_group, other=0.0).to(tl.float64)
    m_calibration = where_present(m_group, p.present, CALIBRATION)
    b_factor = tl.load(p.calibration + o_group, m_calibration, other=1.0).to(tl.float64)
    b_score = b_factor * b_loss / p.temperature
    # Comparisons, because tl.minimum would drop a NaN.
    b_score = tl.where(b_score > _LARGEST, _LARGEST, b_score)
    return tl.where(b_score < -_LARGEST, -_LARGEST, b_score), b_factor


@triton.jit
def advance(p: ChunkPointers, first_group: tl.tensor, last_group: tl.tensor) -> tl.tensor:
    """Take a chunk's scores into the state; returns the shift now in force."""
    o_block = tl.arange(0, _SCORE_BLOCK)
    b_highest = tl.full([_SCORE_BLOCK], float("-inf"), tl.float64)
    for i_block in range(first_group, last_group, _SCORE_BLOCK):
        m_group = i_block + o_block < last_group
        b_score, _ = _tilt(p, i_block + o_block, m_group)
        # A NaN makes no maximum, it reaches the sum below.
        b_highest = tl.maximum(b_highest, tl.where(m_group & (b_score == b_score), b_score, float("-inf")))
    highest = tl.max(b_highest, 0)
    old = tl.load(p.state)
    begins = old == float("-inf")
    shift = tl.where(begins | (highest > old + _HEADROOM), highest, old)
    rescale = tl.where(begins | (shift == old), 1.0, tl.exp(old - shift))
    b_total = tl.zeros([_SCORE_BLOCK], tl.float64)
    for i_block in range(first_group, last_group, _SCORE_BLOCK):
        m_group = i_block + o_block < last_group
        b_score, _ = _tilt(p, i_block + o_block, m_group)
        b_total += tl.where(m_group, tl.exp(b_score - shift), 0.0)
    total = tl.load(p.state + 1) * rescale + tl.sum(b_total, 0)
    tl.store(p.state, shift)
    tl.store(p.state + 1, total)
    tl.store(p.state + 2, rescale)
    return shift


@triton.jit
def write_rows(
    p: ChunkPointers,
    first_group: tl.tensor,
    last_group: tl.tensor,
    shift: tl.tensor,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Coefficients of the rows of up to GROUPS groups, from `first_group` on."""
    o_group = first_group + tl.arange(0, GROUPS)
    m_group = o_group < last_group
    b_score, b_factor = _tilt(p, o_group, m_group)
    b_weight = tl.exp(b_score - shift) * b_factor
    o_first = tl.load(p.group_offsets + o_group, m_group, other=0)
    b_size = tl.load(p.group_offsets + o_group + 1, m_group, other=0) - o_first
    o_slot = tl.arange(0, K)[None, :]
    m_response = o_slot < b_size[:, None]
    o_response = o_first[:, None] + o_slot
    b_derivative = tl.load(p.derivative + o_response, m_response, other=0.0).to(tl.float64)
    b_coefficient = tl.reshape((-b_weight[:, None] * b_derivative).to(tl.float32), [GROUPS * K])
    b_start = tl.load(p.seq_offsets + o_response, m_response, other=0)
    b_count = tl.load(p.seq_offsets + o_response + 1, m_response, other=0) - b_start
    b_start, b_count = tl.reshape(b_start, [GROUPS * K]), tl.reshape(b_count, [GROUPS * K])
    longest = tl.max(b_count, 0)
    for o_block in range(0, longest, TOKENS):
        o_token = o_block + tl.arange(0, TOKENS)[None, :]
        o_row = b_start[:, None] + o_token
        m_row = o_token < b_count[:, None]
        b_counted = tl.load(p.counted + o_row, where_present(m_row, p.present, COUNTED), other=1)
        tl.store(p.coefficients + o_row, tl.where(b_counted != 0, b_coefficient[:, None], 0.0), m_row)


@epilogue_jit
def row_coefficients_kernel(
    p_counted: tl.tensor,
    p_seq_offsets: tl.tensor,
    p_group_offsets: tl.tensor,
    p_calibration: tl.tensor,
    p_losses: tl.tensor,
    p_derivative: tl.tensor,
    p_coefficients: tl.tensor,
    p_state: tl.tensor,
    first_group: tl.int64,
    present: tl.int32,
    temperature: tl.float64,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
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
    i_group = first_group + tl.program_id(0)
    write_rows(chunk, i_group, i_group + 1, tl.load(p_state), 1, K, TOKENS)


def aot_variants() -> list[Variant]:
    """Every padded size of a group. Loads are 4 bytes wide, since responses begin anywhere, so none is hot."""
    arguments = {name: kind for name, kind in ARGUMENTS.items() if name in row_coefficients_kernel.arg_names}
    found = []
    for width in (1 << bit for bit in range(1, MAX_WIDTH.bit_length())):
        shape = launch_shape(width)
        constants = {"K": width, "TOKENS": shape.tokens}
        options = {"num_warps": shape.warps}
        found.append(
            Variant(f"K={width}", row_coefficients_kernel, arguments, constants, frozenset(), options, hot=False)
        )
    return found
