"""group_epilogue through the native CUDA extension (csrc/group_epilogue_cuda.cu)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from robust_dpo import _cuda
from robust_dpo.errors import argument_error
from robust_dpo.kernels.cuda_target import MAX_BLOCKS, address, cuda_target
from robust_dpo.kernels.group_epilogue import (
    HEADROOM,
    EpilogueVectors,
    NativeLoss,
    check_arguments,
    has_loss,
    option_values,
)
from robust_dpo.losses import BoundLoss

MAX_WIDTH = _cuda.MAX_WIDTH
# Name -> options of the losses in csrc/group_losses.h; a loss's code is its place.
LOSSES = {name: tuple(options) for name, options in _cuda.group_losses()}
_CODES = {name: code for code, name in enumerate(LOSSES)}


def supports(loss: BoundLoss, widest: int) -> bool:
    """Whether the kernel has this loss, for groups of up to `widest` responses."""
    return widest <= MAX_WIDTH and has_loss(LOSSES, loss)


def group_epilogue(
    vectors: EpilogueVectors, loss: NativeLoss, temperature: float | None, first_group: int, last_group: int
) -> None:
    """From token log-probs to the coefficients of a chunk's rows; see `GroupEpilogueLauncher`.

    Raises:
        ValueError: an argument is not as it says there, or a group has more than 256 responses.
        RuntimeError: CUDA refuses the launch, or an earlier launch has failed; names kernel and shape.
    """
    check_arguments(vectors, temperature, first_group, last_group)
    first, second = option_values(LOSSES, loss)
    v = vectors
    if v.widest > MAX_WIDTH:
        raise argument_error("vectors.widest", f"at most {MAX_WIDTH} responses in a group", v.widest)
    if last_group - first_group > MAX_BLOCKS:
        raise argument_error("first_group, last_group", f"at most {MAX_BLOCKS} groups", (first_group, last_group))
    target = cuda_target("vectors.logps", v.logps)
    scores = None if v.scores is None else v.scores.float()
    _cuda.group_epilogue(
        **target,
        counter=_counter(v.logps.device, target["stream"]).data_ptr(),
        widest=v.widest,
        loss=_CODES[loss.name],
        first=first,
        second=second,
        token_logps=v.token_logps.data_ptr(),
        ref_token_logps=address(v.ref_token_logps),
        counted=address(v.counted),
        seq_offsets=v.seq_offsets.data_ptr(),
        group_offsets=v.group_offsets.data_ptr(),
        lengths=v.lengths.data_ptr(),
        scores=address(scores),
        calibration=address(v.calibration),
        logps=v.logps.data_ptr(),
        ref_logps=address(v.ref_logps),
        losses=v.losses.data_ptr(),
        derivative=v.derivative.data_ptr(),
        coefficients=address(v.coefficients),
        state=address(v.state),
        live=v.ref_token_logps is not None,
        tilted=temperature is not None,
        first_group=first_group,
        last_group=last_group,
        temperature=0.0 if temperature is None else temperature,
        headroom=HEADROOM,
    )


def _counter(device: torch.device, stream: int) -> Tensor:
    """[1] int32, blocks of the launch that are done; zero between launches."""
    if device.type == "cuda" and _captures(device):
        # A graph may be replayed beside anything else, so it has its own, which its every replay sets to zero.
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _counter_of_stream(device, stream)


def _captures(device: torch.device) -> bool:
    with torch.cuda.device(device):  # the question is about the current device
        return torch.cuda.is_current_stream_capturing()


@functools.cache
def _counter_of_stream(device: torch.device, stream: int) -> Tensor:
    """Launches on one stream follow one another, so they share a counter, and no launch has to fill it first."""
    return torch.zeros(1, dtype=torch.int32, device=device)
