"""Calibration h: how much likelier a response is under the target distribution than under the training mixture.

P(y|x) = α Q₀(y|x) + Σ_{i=1}^{n−1} β_i Q_i(y|x), Q₀ the target (DoRA, arXiv 2504.05831). A classifier gives c, the
probability that a response comes from the target and not from a source, and γ = (source samples)/(target samples) in
its training set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from robust_dpo.checks import POSITIVE, Interval, check_flag, check_number
from robust_dpo.dispatch import backend_name, get_calibration_weights
from robust_dpo.errors import argument_error, type_error
from robust_dpo.kernels.calibration_weights import WeightForm
from robust_dpo.kernels.calibration_weights_torch import mixture_weights, paper_weights

__all__ = ["Form", "Numbers", "density_ratio", "mixture_weights", "paper_weights"]

Form = Literal["paper", "mixture", "official"]
Numbers = float | Sequence[float] | Tensor

_PROPORTION = Interval(0.0, 1.0, low_open=True)
# The authors' β by candidate position; their α is 1/K. Other K: 1/K in every position, as theirs for 2 and 4.
_OFFICIAL_BETAS = {6: (1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 3, 1 / 6)}


def density_ratio(
    probs: Tensor,
    form: Form = "paper",
    *,
    alpha: float | None = None,
    betas: Numbers | None = None,
    gammas: Numbers | None = None,
    clip: float | None = None,
    per_source: bool = False,
    group_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Calibration h ≥ 0 of responses from classifier probabilities; detached.

    With one probability per response and no options, `paper` is 2c/(2−c), `mixture` is 2c and `official` is K·p for
    K = 2.

    Args:
        probs: floating, in [0, 1]. One classifier, target against all sources (`per_source=False`): any shape, one
            value per response. One classifier for each of m sources (`per_source=True`): [..., m].
            `official`: [..., K], the K responses of a group in the last axis, or [S] with `group_size` K.
        form: `paper`, the mean over slots of γ_i c_i / (β_i (1 − c_i) + 1/n); the n slots are α's and those of the
            n − 1 sources, all with the same c, or with `per_source` the sources'. `mixture`, the exact density ratio
            under the mixture, 1 / (α + Σ_i β_i (1 − c_i)/(γ_i c_i)). `official`, the DoRA authors' code,
            1 / (α + β_i (1 − p)/p) with the β of the response's position i in its group.
        alpha: share of the target in the mixture; default 1 − Σβ, or 1/n (`official`: 1/K).
        betas: shares of the sources, one number for one source; default: what α leaves, in equal parts. Together with α
            they sum to 1. `official`: one for each of the K positions, of any sum; by default the authors'.
        gammas: γ of each source, default 1; for `paper` with one classifier a single number. Not for `official`.
        clip: upper bound of h, > 0; default none.
        per_source: the last axis of `probs` holds one classifier for each source. Not for `official`.
        group_size: K, for flat `probs` with `official`.
        backend: "auto", or one that must be used; plain PyTorch stands in where it has no such kernel. "triton" and
            "cuda" take no float64.

    Returns:
        h in the dtype of `probs`, at least fp32; shaped like `probs`, without its last axis with `per_source`. It is
        finite for probabilities of exactly 0 and 1 too.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a probability is NaN or outside [0, 1] (named with its position), or a share is out of its range.
        RuntimeError: the backend that was asked for cannot run this.
    """
    if form not in get_args(Form):
        raise argument_error("form", f"one of {', '.join(get_args(Form))}", repr(form))
    probs = _checked_probs(probs)
    check_flag("per_source", per_source)
    if form == "official":
        if gammas is not None:
            raise argument_error("gammas", "None with form 'official', which has no γ", gammas)
        if per_source:
            raise argument_error("per_source", "False with form 'official', which has one classifier", per_source)
        slots = _official(probs, alpha, betas, group_size)
    else:
        if group_size is not None:
            raise argument_error("group_size", f"None with form {form!r}, whose h does not depend on it", group_size)
        slots = _mixture_or_paper(probs, form, alpha, betas, gammas, per_source)
    clip = None if clip is None else check_number("clip", clip, POSITIVE)
    classifiers = probs.shape[-1] if per_source else 1
    launcher = get_calibration_weights(backend_name(backend), probs.device, probs.dtype)
    h = launcher(
        probs.reshape(probs.numel() // classifiers, classifiers).contiguous(),
        probs.new_tensor(slots.betas),
        probs.new_tensor(slots.gammas),
        form=slots.form,
        alpha=slots.alpha,
        num_distributions=slots.num_distributions,
        clip=clip,
    )
    return h.view(probs.shape[:-1] if per_source else probs.shape)


class _Slots(NamedTuple):
    """What the kernels need of a mixture; see `CalibrationWeightsLauncher`."""

    form: WeightForm
    betas: list[list[float]]
    gammas: list[float]
    alpha: float
    num_distributions: int


def _official(probs: Tensor, alpha: float | None, betas: Numbers | None, group_size: int | None) -> _Slots:
    if group_size is None and probs.ndim < 2:
        raise argument_error("probs", "shape [..., K], or [S] with group_size", list(probs.shape))
    if group_size is not None:
        if probs.ndim != 1:
            raise argument_error("group_size", f"None with probs of shape {list(probs.shape)}", group_size)
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise type_error("group_size", "an integer", group_size)
        if group_size < 1 or len(probs) % group_size:
            raise argument_error("group_size", f"a divisor of the {len(probs)} responses", group_size)
    width = probs.shape[-1] if group_size is None else group_size
    alpha = 1 / width if alpha is None else check_number("alpha", alpha, _PROPORTION)
    default = _OFFICIAL_BETAS.get(width, (1 / width,) * width)
    shares = _numbers("betas", default if betas is None else betas, _PROPORTION)
    if len(shares) != width:
        raise argument_error("betas", f"{width} numbers, one for each response of a group", len(shares))
    # One classifier, balanced, and the position's own β as its only source: the mixture form of each response.
    return _Slots("mixture", [[share] for share in shares], [1.0], alpha, 2)


def _mixture_or_paper(
    probs: Tensor,
    form: WeightForm,
    alpha: float | None,
    betas: Numbers | None,
    gammas: Numbers | None,
    per_source: bool,
) -> _Slots:
    if per_source and (probs.ndim == 0 or probs.shape[-1] == 0):
        raise argument_error("probs", "shape [..., m] with per_source, m ≥ 1 classifiers", list(probs.shape))
    target, sources = _shares(alpha, betas, probs.shape[-1] if per_source else 1)
    if per_source and len(sources) != probs.shape[-1]:
        raise argument_error("betas", f"{probs.shape[-1]} numbers, one for each source in probs", len(sources))
    ratios = _numbers("gammas", 1.0 if gammas is None else gammas, POSITIVE)
    if len(ratios) not in (1, len(sources)):
        raise argument_error("gammas", f"1 or {len(sources)} numbers, as betas", len(ratios))
    if form == "paper" and not per_source and len(ratios) > 1:
        raise argument_error("gammas", "one number: a single classifier has a single training set", len(ratios))
    slots = [target, *sources] if form == "paper" and not per_source else sources
    ratios = ratios * len(slots) if len(ratios) == 1 else ratios
    return _Slots(form, [slots], ratios, target, len(sources) + 1)


def _shares(alpha: float | None, betas: Numbers | None, num_sources: int) -> tuple[float, list[float]]:
    """α and β of a mixture, filled in so that they sum to 1."""
    below_one = Interval(0.0, 1.0, low_open=True, high_open=True)
    if betas is None:
        target = check_number("alpha", 1 / (num_sources + 1) if alpha is None else alpha, below_one)
        return target, [(1 - target) / num_sources] * num_sources
    sources = _numbers("betas", betas, below_one)
    if alpha is None and sum(sources) >= 1:
        raise argument_error("betas", "a sum below 1, the rest is the target's share", sum(sources))
    target = check_number("alpha", 1 - sum(sources) if alpha is None else alpha, below_one)
    if abs(target + sum(sources) - 1) > 1e-6:
        raise argument_error("betas", f"a sum of 1 − alpha = {1 - target:g}", sum(sources))
    return target, sources


def _numbers(name: str, values: Numbers, interval: Interval) -> list[float]:
    if isinstance(values, Tensor):
        values = values.flatten().tolist()
    items = list(values) if isinstance(values, Sequence) else [values]
    if not items:
        raise argument_error(name, "at least one number", "none")
    return [check_number(name, value, interval) for value in items]


def _checked_probs(probs: Tensor) -> Tensor:
    if not isinstance(probs, Tensor):
        raise type_error("probs", "a floating tensor of probabilities", probs)
    if not probs.is_floating_point():
        raise TypeError(f"probs: expected a floating tensor of probabilities, got {probs.dtype}")
    probs = probs.detach().to(torch.promote_types(probs.dtype, torch.float32))
    bad = ~((probs >= 0) & (probs <= 1))
    if bool(bad.any()):
        position = bad.nonzero()[0].tolist()
        raise argument_error("probs", f"probabilities in [0, 1] at position {position}", float(probs[bad][0]))
    return probs
