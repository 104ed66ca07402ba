"""The DoRA authors' training losses (arXiv 2504.05831 and its published code), to reproduce published behaviour.

They differ from the objectives of this package in two ways, both kept here: the value is taken over the prompts that
are passed in, however few, and RRHF and LIRE put the calibration elsewhere than the paper does. The exponentials are
computed with their maximum subtracted, so values are finite where the authors' code overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robust_dpo.calibration.density_ratio import density_ratio
from robust_dpo.checks import NON_NEGATIVE, POSITIVE, check_number
from robust_dpo.errors import argument_error, type_error
from robust_dpo.groups import Groups
from robust_dpo.losses import resolve
from robust_dpo.robust import KLRobust


@dataclass(frozen=True)
class _Batch:
    """B prompts of K candidates: `groups` [B, K] and the token log-probs [B, K, L]."""

    groups: Groups
    token_logps: Tensor


@dataclass(frozen=True)
class _Hyper:
    beta_dpo: float
    temperature: float
    length_penalty: float
    sft_index: int


def _rrhf(batch: _Batch, hyper: _Hyper) -> Tensor:
    """[B, K] the batch's one scalar, the mean rank term plus SFT, once for every candidate that calibrates it."""
    width = batch.token_logps.shape[1]
    if isinstance(hyper.sft_index, bool) or not isinstance(hyper.sft_index, int):
        raise type_error("sft_index", "an integer", hyper.sft_index)
    if not -width <= hyper.sft_index < width:
        raise argument_error("sft_index", f"a candidate position, −{width} to {width - 1}", hyper.sft_index)
    rank = resolve("rrhf", options={"length_penalty": hyper.length_penalty})(batch.groups).mean()
    sft = -batch.token_logps[:, hyper.sft_index].mean()
    return (rank + sft).expand(batch.token_logps.shape[:2])


def _lire(batch: _Batch, hyper: _Hyper) -> Tensor:
    return resolve("lire", options={"temperature": hyper.temperature})(batch.groups)


def _dpo_bt(batch: _Batch, hyper: _Hyper) -> Tensor:
    """Candidates 0 and 1 as chosen and rejected, whatever their scores."""
    full = batch.groups
    if full.logps.shape[1] < 2 or full.ref_logps is None:
        raise argument_error("scores", "at least 2 candidates for 'dpo_bt'", full.logps.shape[1])
    first = Groups(full.logps[:, :2], full.lengths[:, :2], full.mask[:, :2], full.ref_logps[:, :2])
    return resolve("sigmoid", hyper.beta_dpo)(first)


def _dpo_pl(batch: _Batch, hyper: _Hyper) -> Tensor:
    return resolve("plackett_luce", hyper.beta_dpo)(batch.groups)


@dataclass(frozen=True)
class _Method:
    """A loss of each prompt [B] (or [B, K]), whether it reads the reference, and where its calibration stands."""

    losses: Callable[[_Batch, _Hyper], Tensor]
    needs_reference: bool
    calibration: Literal["inside", "outside"] = "inside"


_METHODS = {
    "rrhf": _Method(_rrhf, needs_reference=False),
    "lire": _Method(_lire, needs_reference=False, calibration="outside"),
    "dpo_bt": _Method(_dpo_bt, needs_reference=True),
    "dpo_pl": _Method(_dpo_pl, needs_reference=True),
}
_VARIANTS = ("plain", "dora")


def loss(
    method: str,
    variant: str,
    token_logps: Tensor,
    ref_token_logps: Tensor | None,
    mask: Tensor,
    scores: Tensor,
    probs: Tensor,
    *,
    lambda_: float | None = None,
    alpha: float | None = None,
    beta_vec: Sequence[float] | Tensor | None = None,
    beta_dpo: float | None = None,
    T: float | None = None,
    length_penalty: float | None = None,
    sft_index: int | None = None,
) -> Tensor:
    """The authors' loss of B prompts with K candidates each; differentiable in `token_logps`.

    | method | ℓ of a prompt | `dora` |
    |---|---|---|
    | `rrhf` | X = mean rank term + SFT, one scalar for the batch | λ log mean_{b,i} exp(X w_{b,i}/λ) |
    | `lire` | −(1/K) Σ softmax(S/T)·softmax(scores) | mean(w) · λ log mean_b exp(ℓ_b/λ) |
    | `dpo_bt` | −logσ(β(d₀ − d₁)) | λ log mean_b exp(w̄_b ℓ_b/λ) |
    | `dpo_pl` | Plackett-Luce over the candidates by score, divided by K | as `dpo_bt` |

    `plain` is the mean of ℓ. w is the `official` calibration of `density_ratio`, w̄ its mean over a prompt's candidates.

    Args:
        method: `rrhf`, `lire`, `dpo_bt` or `dpo_pl`.
        variant: `plain` or `dora`.
        token_logps: [B·K, L] floating, policy log-prob of each token, row b·K + k.
        ref_token_logps: [B·K, L], the same under the reference; None will do for `rrhf` and `lire`.
        mask: [B·K, L], non-zero at response tokens; every row has one. SFT averages over all L, masked ones as 0.
        scores: [B, K], higher is better.
        probs: [B, K], classifier probabilities in [0, 1].
        lambda_: λ > 0, default 1.
        alpha, beta_vec: mixture shares by candidate position; by default the authors' for this K.
        beta_dpo: β of the DPO losses, default 0.1.
        T: LIRE's temperature, default 2.
        length_penalty: RRHF's exponent of the length, default 1.
        sft_index: the candidate of RRHF's SFT term, default −2.
            None takes the default everywhere.

    Returns:
        [] in the dtype of `token_logps`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.
    """
    if method not in _METHODS:
        raise argument_error("method", f"one of {', '.join(_METHODS)}", repr(method))
    if variant not in _VARIANTS:
        raise argument_error("variant", f"one of {', '.join(_VARIANTS)}", repr(variant))
    entry = _METHODS[method]
    if entry.needs_reference and ref_token_logps is None:
        raise argument_error("ref_token_logps", f"a tensor for the method {method!r}", None)
    batch = _batch(token_logps, ref_token_logps, mask, scores)
    hyper = _Hyper(
        check_number("beta_dpo", 0.1 if beta_dpo is None else beta_dpo, POSITIVE),
        check_number("T", 2.0 if T is None else T, POSITIVE),
        check_number("length_penalty", 1.0 if length_penalty is None else length_penalty, NON_NEGATIVE),
        -2 if sft_index is None else sft_index,
    )
    lam = check_number("lambda_", 1.0 if lambda_ is None else lambda_, POSITIVE)
    _check_tensor("probs", probs, list(scores.shape))
    if beta_vec is not None and len(beta_vec) != scores.shape[1]:
        raise argument_error("beta_vec", f"{scores.shape[1]} shares, one for each candidate", len(beta_vec))
    weights = density_ratio(probs.to(batch.groups.logps), "official", alpha=alpha, betas=beta_vec)
    losses = entry.losses(batch, hyper)
    if variant == "plain":
        return losses.mean()
    calibration = weights if losses.ndim == 2 else weights.mean(1)
    objective = KLRobust(lam, calibration=entry.calibration)
    return objective.solve(losses.flatten(), calibration.flatten()).attach(losses.flatten())


def _batch(token_logps: Tensor, ref_token_logps: Tensor | None, mask: Tensor, scores: Tensor) -> _Batch:
    _check_tensor("scores", scores)
    if scores.ndim != 2 or scores.numel() == 0:
        raise argument_error("scores", "shape [B, K] with at least one prompt and candidate", list(scores.shape))
    _check_tensor("token_logps", token_logps)
    if token_logps.ndim != 2 or token_logps.shape[0] != scores.numel():
        raise argument_error("token_logps", f"shape [{scores.numel()}, L], B·K rows", list(token_logps.shape))
    shape = list(token_logps.shape)
    if not isinstance(mask, Tensor):
        raise type_error("mask", "a tensor", mask)
    if list(mask.shape) != shape:
        raise argument_error("mask", f"shape {shape}", list(mask.shape))
    width = scores.shape[1]
    keep = mask.to(token_logps.device) != 0
    lengths = keep.sum(1)
    if bool((lengths == 0).any()):
        empty = int((lengths == 0).nonzero()[0])
        raise argument_error("mask", "at least one token in every row", f"none in row {empty}")
    tokens = token_logps.masked_fill(~keep, 0.0)
    ref_logps = None
    if ref_token_logps is not None:
        _check_tensor("ref_token_logps", ref_token_logps, shape)
        ref_logps = ref_token_logps.detach().to(tokens).masked_fill(~keep, 0.0).sum(1).view(-1, width)
    groups = Groups(
        logps=tokens.sum(1).view(-1, width),
        lengths=lengths.to(tokens.dtype).view(-1, width),
        mask=torch.ones(scores.shape, dtype=torch.bool, device=tokens.device),
        ref_logps=ref_logps,
        scores=scores.to(tokens),
    )
    return _Batch(groups, tokens.view(-1, width, tokens.shape[1]))


def _check_tensor(name: str, value: object, shape: list[int] | None = None) -> None:
    """A finite floating tensor, of that shape where one is given."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise type_error(name, "a floating tensor", value)
    if shape is not None and list(value.shape) != shape:
        raise argument_error(name, f"shape {shape}", list(value.shape))
    bad = ~value.detach().isfinite()
    if bool(bad.any()):
        position = bad.nonzero()[0].tolist()
        raise argument_error(name, f"finite values at position {position}", float(value.detach()[bad][0]))
