"""rescale in Triton: 8 bytes of traffic per fp32 element, or one read of the factor where that is 1."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust_dpo.errors import argument_error
from robust_dpo.kernels.gpu import gpu_of
from robust_dpo.kernels.triton_aot import Variant

DTYPES = (torch.float32, torch.float64)
# A bounded grid: the launch that changes nothing is over when each program has read one number, however large the
# tensor. 4 programs of 16 KB keep 64 KB of loads in flight on a multiprocessor, enough to hide the latency of HBM.
PROGRAMS_PER_MULTIPROCESSOR = 4
BLOCK_BYTES = 16384
NUM_WARPS = 8


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["p_factor"])
def rescale_kernel(p_total: tl.tensor, p_factor: tl.tensor, count: tl.int64, BLOCK: tl.constexpr) -> None:
    factor = tl.load(p_factor).to(p_total.dtype.element_ty)
    if factor != 1.0:
        o_block = tl.arange(0, BLOCK)
        blocks = count // BLOCK
        # Whole blocks have no mask, so that every thread moves 16 bytes at a time whatever the count is a multiple of.
        for i_block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            p_block = p_total + i_block * BLOCK + o_block
            tl.store(p_block, tl.load(p_block) * factor)
        if tl.program_id(0) == tl.num_programs(0) - 1:
            o_rest = blocks * BLOCK + o_block
            m_rest = o_rest < count
            tl.store(p_total + o_rest, tl.load(p_total + o_rest, m_rest, other=0.0) * factor, m_rest)


def rescale(total: Tensor, factor: Tensor) -> None:
    """Multiply `total` in place; see `RescaleLauncher`.

    Raises:
        ValueError: a dtype, shape, device or layout is not as it says there.
    """
    if total.dtype not in DTYPES:
        raise argument_error("total", "dtype float32 or float64", total.dtype)
    if not total.is_contiguous():
        raise argument_error("total", "a contiguous tensor", f"strides {total.stride()}")
    if factor.dtype not in DTYPES or factor.numel() != 1:
        raise argument_error("factor", "one number of float32 or float64", f"{list(factor.shape)} of {factor.dtype}")
    if factor.device != total.device:
        raise argument_error("factor", f"a tensor on {total.device}, as total", factor.device)
    count = total.numel()
    if count == 0:
        return
    block = BLOCK_BYTES // total.element_size()
    with torch.cuda.device(total.device) if total.is_cuda else nullcontext():
        programs = min(triton.cdiv(count, block), PROGRAMS_PER_MULTIPROCESSOR * gpu_of(total.device).multiprocessors)
        rescale_kernel[(programs,)](total, factor, count, BLOCK=block, num_warps=NUM_WARPS, enable_fp_fusion=True)


def aot_variants() -> list[Variant]:
    """Both dtypes of the tensor and of the factor, aligned to 16 bytes or not."""
    found = []
    for dtype, itemsize in (("fp32", 4), ("fp64", 8)):
        for factor in ("fp32", "fp64"):
            for aligned in (True, False):
                name = f"{dtype} by {factor}, {'aligned' if aligned else 'not aligned'}"
                arguments = {"p_total": f"*{dtype}", "p_factor": f"*{factor}", "count": "i64"}
                divisible = frozenset({"p_total"} if aligned else ())
                constants = {"BLOCK": BLOCK_BYTES // itemsize}
                options = {"num_warps": NUM_WARPS}
                found.append(Variant(name, rescale_kernel, arguments, constants, divisible, options, hot=aligned))
    return found
