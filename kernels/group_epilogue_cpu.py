"""group_epilogue through the native CPU extension (csrc/group_epilogue_cpu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_dpo import _cpu
from robust_dpo.errors import argument_error
from robust_dpo.kernels.group_epilogue import (
    HEADROOM,
    EpilogueVectors,
    NativeLoss,
    check_arguments,
    has_loss,
    option_values,
)
from robust_dpo.losses import BoundLoss

# Name -> options of the losses in csrc/group_losses.h; a loss's code is its place.
LOSSES = {name: tuple(options) for name, options in _cpu.group_losses()}
_CODES = {name: code for code, name in enumerate(LOSSES)}


def supports(loss: BoundLoss, widest: int) -> bool:
    """Whether the kernel has this loss. Groups may be of any size, so `widest` makes no difference."""
    return has_loss(LOSSES, loss)


def group_epilogue(
    vectors: EpilogueVectors, loss: NativeLoss, temperature: float | None, first_group: int, last_group: int
) -> None:
    """From token log-probs to the coefficients of a chunk's rows; see `GroupEpilogueLauncher`."""
    check_arguments(vectors, temperature, first_group, last_group)
    first, second = option_values(LOSSES, loss)
    v = vectors
    if v.logps.device.type != "cpu":
        raise argument_error("vectors.logps", "a tensor on the CPU", v.logps.device)
    scores = None if v.scores is None else v.scores.float()
    _cpu.group_epilogue(
        loss=_CODES[loss.name],
        first=first,
        second=second,
        token_logps=v.token_logps.data_ptr(),
        ref_token_logps=_address(v.ref_token_logps),
        counted=_address(v.counted),
        seq_offsets=v.seq_offsets.data_ptr(),
        group_offsets=v.group_offsets.data_ptr(),
        lengths=v.lengths.data_ptr(),
        scores=_address(scores),
        calibration=_address(v.calibration),
        logps=v.logps.data_ptr(),
        ref_logps=_address(v.ref_logps),
        losses=v.losses.data_ptr(),
        derivative=v.derivative.data_ptr(),
        coefficients=_address(v.coefficients),
        state=_address(v.state),
        live=v.ref_token_logps is not None,
        tilted=temperature is not None,
        first_group=first_group,
        last_group=last_group,
        temperature=0.0 if temperature is None else temperature,
        headroom=HEADROOM,
        threads=torch.get_num_threads(),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
