"""rescale through the native CUDA extension (csrc/rescale_cuda.cu)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from robust_dpo import _cuda
from robust_dpo.errors import argument_error
from robust_dpo.kernels.cuda_target import cuda_target

DTYPES = (torch.float32, torch.float64)
# A bounded grid: the launch that changes nothing is over when each block has read one number, however large the tensor.
# 4 blocks of 256 threads with 4 loads of 16 bytes each have 64 KB under way on a multiprocessor.
BLOCKS_PER_MULTIPROCESSOR = 4


def rescale(total: Tensor, factor: Tensor) -> None:
    """Multiply `total` in place; see `RescaleLauncher`.

    Raises:
        ValueError: a dtype, shape, device or layout is not as it says there.
        RuntimeError: CUDA refuses the launch, or an earlier launch has failed; names kernel and shape.
    """
    if total.dtype not in DTYPES:
        raise argument_error("total", "dtype float32 or float64", total.dtype)
    if not total.is_contiguous():
        raise argument_error("total", "a contiguous tensor", f"strides {total.stride()}")
    if factor.dtype not in DTYPES or factor.numel() != 1:
        raise argument_error("factor", "one number of float32 or float64", f"{list(factor.shape)} of {factor.dtype}")
    if factor.device != total.device:
        raise argument_error("factor", f"a tensor on {total.device}, as total", factor.device)
    _cuda.rescale(
        **cuda_target("total", total),
        total=total.data_ptr(),
        total_is_double=total.dtype == torch.float64,
        count=total.numel(),
        factor=factor.data_ptr(),
        factor_is_double=factor.dtype == torch.float64,
        blocks=_blocks(total.device),
    )


@functools.cache
def _blocks(device: torch.device) -> int:
    if device.type != "cuda":
        return BLOCKS_PER_MULTIPROCESSOR
    return BLOCKS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
