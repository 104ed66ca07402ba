"""Kernels of which it is known what the compiler must make, to test the reader of its output."""

from __future__ import annotations

import triton
import triton.language as tl

from robust_dpo.kernels.triton_aot import Variant


@triton.jit
def row_sum_kernel(p_x, p_y, stride, n, BLOCK: tl.constexpr):
    """A loop over one row: 16-byte loads where pointer and stride are known to be multiples of 16, else scalars."""
    p_row = p_x + tl.program_id(0).to(tl.int64) * stride
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_start in range(0, n, BLOCK):
        o = i_start + tl.arange(0, BLOCK)
        b_sum += tl.load(p_row + o, mask=o < n, other=0).to(tl.float32)
    tl.store(p_y + tl.program_id(0), tl.sum(b_sum))


@triton.jit
def copy_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """No loop, and offsets of 32 bits."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n), mask=o < n)


@triton.jit
def hoard_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """Keeps two blocks alive through a loop: far more than 255 registers of a thread."""
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    b_y = tl.load(p_y + o)
    for i in range(n):
        b_y += b_x * i
        b_x += tl.exp(b_y)
    tl.store(p_y + o, b_x + b_y)


@triton.jit
def broken_kernel(p_x, BLOCK: tl.constexpr):
    """A block of 1,000 elements, which Triton does not have."""
    tl.store(p_x + tl.arange(0, BLOCK), 0.0)


def _row_sum(name: str, divisible: set[str], block: int, hot: bool = True) -> Variant:
    arguments = {"p_x": "*bf16", "p_y": "*fp32", "stride": "i64", "n": "i32"}
    return Variant(name, row_sum_kernel, arguments, {"BLOCK": block}, frozenset(divisible), {"num_warps": 4}, hot)


def aot_variants() -> list[Variant]:
    """One variant for each thing that the report must see."""
    flat = {"p_x": "*fp32", "p_y": "*fp32", "n": "i32"}
    aligned = frozenset(flat)
    return [
        _row_sum("wide", {"p_x", "p_y", "stride", "n"}, 1024),
        _row_sum("scalar", {"p_x", "p_y"}, 1024),
        _row_sum("scalar, cold", {"p_x", "p_y"}, 1024, hot=False),
        Variant("copy", copy_kernel, flat, {"BLOCK": 1024}, aligned, {"num_warps": 4}, True),
        Variant("hoard", hoard_kernel, flat, {"BLOCK": 32768}, aligned, {"num_warps": 4}, True),
        Variant("broken", broken_kernel, {"p_x": "*fp32"}, {"BLOCK": 1000}, frozenset(), {}, False),
    ]
