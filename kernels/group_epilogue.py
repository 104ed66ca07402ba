"""What every group_epilogue launcher takes and fills in: the vectors of one batch and the loss of its groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from robust_dpo.errors import argument_error

if TYPE_CHECKING:
    from robust_dpo.losses import BoundLoss


class NativeLoss(NamedTuple):
    """A built-in loss as kernels know it.

    Args:
        name: in the registry of losses.
        arguments: option -> value, as in `BoundLoss.arguments`.
    """

    name: str
    arguments: dict[str, float | bool]


@dataclass(frozen=True)
class EpilogueVectors:
    """The vectors of one batch: N rows, S responses, G groups; all on one device, contiguous, fp32 but where noted.

    Args:
        token_logps: [N] log-prob of each row's target under the policy.
        ref_token_logps: [N] the same under a live reference, or None.
        counted: [N] bool, False for rows that belong to nobody (target −100), or None where all count.
        seq_offsets: [S + 1] int64, rows of response s are seq_offsets[s] … seq_offsets[s + 1] − 1.
        group_offsets: [G + 1] int64, responses of group g are group_offsets[g] … group_offsets[g + 1] − 1.
        lengths: [S] tokens of each response, at least 1.
        scores: [S] quality in fp32, bf16 or fp16, higher is better, or None: best first.
        calibration: [G] h, or None for ones.
        logps: [S], filled with the sums of token_logps.
        ref_logps: [S] filled with the sums of ref_token_logps; given where there are none; or None: no reference.
        losses: [G], filled.
        derivative: [S], filled with ∂ℓ/∂logp.
        coefficients: [N], filled with −e^{s − shift} · factor · ∂ℓ/∂logp of the row's response, 0 where it does not
            count: what softmax − onehot of the row is to be multiplied by. None in a pass without tilt.
        state: [3] float64 (shift, Σ e^{s − shift}, rescale), carried from chunk to chunk; before the first one
            (−inf, 0, 1). None in a pass without tilt.
        widest: responses of the largest group.
    """

    token_logps: Tensor
    ref_token_logps: Tensor | None
    counted: Tensor | None
    seq_offsets: Tensor
    group_offsets: Tensor
    lengths: Tensor
    scores: Tensor | None
    calibration: Tensor | None
    logps: Tensor
    ref_logps: Tensor | None
    losses: Tensor
    derivative: Tensor
    coefficients: Tensor | None
    state: Tensor | None
    widest: int


class GroupEpilogueLauncher(Protocol):
    """group_epilogue on one backend, for the built-in losses.

    Of groups first … last − 1: sums of token log-probs (in more than fp32), group losses ℓ and their derivative. With
    a `temperature` t also the scores s = hℓ/t (t = ±inf: 0), held to finite fp64 numbers, the factor h, and the
    accumulation: the shift is the largest score of the first chunk, and stays until a score exceeds it by more than
    `HEADROOM`; then it becomes that score, `rescale` is e^{old − new}, and what was accumulated so far must be
    multiplied by it. Otherwise `rescale` is 1. ℓ in s is `losses` as they are stored, so that who normalises by them
    finds the same s. Sums are taken in a fixed order: results are the same bits in every run. A NaN makes no shift; it
    reaches Σ, and with it every gradient.

    Args:
        vectors: of the whole batch; only entries of these groups, their responses and rows are read and written.
        loss: one that `supports` accepts.
        temperature: t of the exponential tilt, signed, possibly infinite; None for losses and derivatives alone.
        first_group: of the chunk.
        last_group: one behind its last.
    """

    def __call__(
        self, vectors: EpilogueVectors, loss: NativeLoss, temperature: float | None, first_group: int, last_group: int
    ) -> None: ...


# Unnormalised weights e^{s − shift} may grow by e³⁰ before the accumulators are rescaled: far from the fp32 overflow at
# e⁸⁸, and rare enough that rescaling costs nothing.
HEADROOM = 30.0


def has_loss(options: Mapping[str, tuple[str, ...]], loss: BoundLoss) -> bool:
    """Whether a kernel with these losses (name -> names of the options that it takes) has this one."""
    known = loss.built_in and loss.name in options
    return known and {name for name, _ in loss.arguments} == set(options[loss.name])


def option_values(options: Mapping[str, tuple[str, ...]], loss: NativeLoss) -> tuple[float, float]:
    """The loss's options as a kernel takes them: two numbers, in its order, 0 for those that there are not.

    Raises:
        ValueError: the kernel does not have the loss, or an option is missing.
    """
    if loss.name not in options:
        raise argument_error("loss", f"one of {', '.join(options)}", repr(loss.name))
    missing = [name for name in options[loss.name] if name not in loss.arguments]
    if missing:
        raise argument_error("loss", f"a value for {', '.join(missing)} of {loss.name!r}", loss.arguments)
    first, second = [*(float(loss.arguments[name]) for name in options[loss.name]), 0.0, 0.0][:2]
    return first, second


_FP32 = (torch.float32,)


def check_arguments(vectors: EpilogueVectors, temperature: float | None, first_group: int, last_group: int) -> None:
    """Refuse what no kernel can run; see `EpilogueVectors` and `GroupEpilogueLauncher`.

    Raises:
        ValueError: a shape, dtype, device or layout is wrong, something needed is missing, or there are no such groups.
    """
    v = vectors
    rows, responses, groups = len(v.token_logps), len(v.logps), len(v.losses)
    checked: list[tuple[str, Tensor | None, int, tuple[torch.dtype, ...]]] = [
        ("token_logps", v.token_logps, rows, _FP32),
        ("ref_token_logps", v.ref_token_logps, rows, _FP32),
        ("counted", v.counted, rows, (torch.bool,)),
        ("seq_offsets", v.seq_offsets, responses + 1, (torch.int64,)),
        ("group_offsets", v.group_offsets, groups + 1, (torch.int64,)),
        ("lengths", v.lengths, responses, _FP32),
        ("scores", v.scores, responses, (torch.float32, torch.bfloat16, torch.float16)),
        ("calibration", v.calibration, groups, _FP32),
        ("logps", v.logps, responses, _FP32),
        ("ref_logps", v.ref_logps, responses, _FP32),
        ("losses", v.losses, groups, _FP32),
        ("derivative", v.derivative, responses, _FP32),
        ("coefficients", v.coefficients, rows, _FP32),
        ("state", v.state, 3, (torch.float64,)),
    ]
    for name, vector, size, dtypes in checked:
        if vector is not None:
            _check_vector(f"vectors.{name}", vector, size, dtypes, v.logps.device)
    if v.ref_token_logps is not None and v.ref_logps is None:
        raise argument_error("vectors.ref_logps", "a vector to fill with the sums of ref_token_logps", None)
    if temperature is not None:
        if not abs(temperature) > 0:
            raise argument_error("temperature", "a number that is not 0, or None", temperature)
        for name, vector in (("coefficients", v.coefficients), ("state", v.state)):
            if vector is None:
                raise argument_error(f"vectors.{name}", "a vector to fill, with a temperature", None)
    if not 0 <= first_group <= last_group <= groups:
        raise argument_error("first_group, last_group", f"0 ≤ first ≤ last ≤ {groups}", (first_group, last_group))


def _check_vector(name: str, vector: Tensor, size: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if vector.shape != (size,):
        raise argument_error(name, f"shape [{size}]", list(vector.shape))
    if vector.dtype not in dtypes:
        raise argument_error(name, f"dtype {' or '.join(map(str, dtypes))}", vector.dtype)
    if vector.device != device:
        raise argument_error(name, f"a tensor on {device}, as logps", vector.device)
    if not vector.is_contiguous():
        raise argument_error(name, "a contiguous vector", f"strides {vector.stride()}")
