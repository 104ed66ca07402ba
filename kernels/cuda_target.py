"""Where a CUDA launch goes: the device and the current stream of a tensor, as the native extension takes them."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from robust_dpo import _cuda
from robust_dpo.errors import argument_error

# Codes of csrc/row_logprob.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# Blocks of one launch.
MAX_BLOCKS = 2**31 - 1


class CudaTarget(TypedDict):
    """First arguments of every function of the extension."""

    device: int
    stream: int


def cuda_target(name: str, tensor: Tensor) -> CudaTarget:
    """The device of an operator's main argument, and the stream that is current there.

    Raises:
        ValueError: it is not on a GPU. (Tests compile the extension for the CPU; then it has to be there.)
    """
    if tensor.device.type != _cuda.DEVICE_TYPE:
        raise argument_error(name, "a tensor on a GPU", tensor.device)
    if not tensor.is_cuda:
        return {"device": 0, "stream": 0}
    return {"device": tensor.get_device(), "stream": torch.cuda.current_stream(tensor.device).cuda_stream}


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
