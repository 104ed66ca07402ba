"""row_logprob through the native CPU extension (csrc/row_logprob_kernel.h)."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from robust_dpo import _cpu
from robust_dpo.errors import argument_error
from robust_dpo.kernels.row_logprob import RowLogprob, accumulation_dtype, check_arguments

ISA_VARIABLE = "ROBUST_DPO_CPU_ISA"
# Codes of csrc/row_logprob.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@functools.cache
def usable_isas() -> tuple[str, ...]:
    """Instruction sets that both the build and this CPU have, the fastest last."""
    return tuple(_cpu.usable_isas())


def thread_runtime() -> str:
    """What runs the threads: "openmp", which is torch's own pool, or "std::thread" where that cannot be shared."""
    return str(_cpu.thread_runtime())


def chosen_isa() -> str:
    """The instruction set in use: the fastest, unless the environment variable ROBUST_DPO_CPU_ISA names another.

    Raises:
        ValueError: the variable names one that this CPU or build lacks.
    """
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted is None:
        return usable_isas()[-1]
    if wanted not in usable_isas():
        raise argument_error(ISA_VARIABLE, f"one that this CPU and build have ({', '.join(usable_isas())})", wanted)
    return wanted


def row_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    grad_out: Tensor | None = None,
    row_scale: Tensor | None = None,
    entropy: bool = False,
    known: RowLogprob | None = None,
) -> RowLogprob:
    """Token log-prob of every row, and its gradient in place; see `RowLogprobLauncher`.

    Nothing is saved where the results are known: in a cache of the size of a row, the statistics cost little.
    """
    check_arguments(logits, targets, bias, softcap, grad_out, row_scale, entropy, known)
    if logits.device.type != "cpu":
        raise argument_error("logits", "a tensor on the CPU", logits.device)
    rows, vocab = logits.shape
    dtype = accumulation_dtype(logits)
    targets = targets.contiguous()
    bias = None if bias is None else bias.detach().to(dtype).contiguous()
    row_scale = None if row_scale is None else row_scale.detach().to(dtype).contiguous()
    logp = torch.empty(rows, dtype=dtype)
    lse = torch.empty_like(logp)
    entropies = torch.empty_like(logp) if entropy else None
    _cpu.row_logprob(
        isa=chosen_isa(),
        tile=logits.data_ptr(),
        tile_dtype=DTYPE_CODES[logits.dtype],
        tile_stride=logits.stride(0),
        rows=rows,
        vocab=vocab,
        targets=targets.data_ptr(),
        bias=_address(bias),
        softcap=0.0 if softcap is None else softcap,
        scale=logit_scale,
        logp=logp.data_ptr(),
        lse=lse.data_ptr(),
        entropy=_address(entropies),
        grad=_address(grad_out),
        grad_dtype=DTYPE_CODES[logits.dtype if grad_out is None else grad_out.dtype],
        grad_stride=0 if grad_out is None else grad_out.stride(0),
        row_scale=_address(row_scale),
        threads=torch.get_num_threads(),
    )
    return RowLogprob(logp, lse, entropies) if known is None else known


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
