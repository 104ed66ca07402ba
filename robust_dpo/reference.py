"""The operators in plain PyTorch: slow, literal, differentiable by autograd. In float64 it is the specification.

Every kernel and every fast path is tested against this file. It holds whole logits and normalises once over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from robust_dpo import losses as group_losses
from robust_dpo.groups import GroupLayout, Groups
from robust_dpo.robust import Chi2, CVaR, DomainBatch, DrDPO, KLRobust, Mean, RobustObjective

IGNORE_INDEX = -100


def transformed_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """[…, H] → […, V]: softcap · tanh(logit_scale · (x Wᵀ + bias) / softcap)."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return cap(logits * logit_scale, softcap)


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits bounded to softcap · tanh(logits / softcap), or the logits themselves."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def row_logprob(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[n, V], [n] → log-prob of the targets [n], log-sum-exp [n], entropy [n] in nats."""
    lse = logits.logsumexp(-1)
    log_probs = logits - lse[:, None]
    probs = log_probs.exp()
    entropy = -torch.where(probs > 0, probs * log_probs, torch.zeros_like(probs)).sum(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0], lse, entropy


def row_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """[n, V] softmax − onehot, which is −∂logp/∂logits."""
    gradient = logits.softmax(-1)
    gradient[torch.arange(len(targets)), targets] -= 1
    return gradient


def sequence_logps(logits: Tensor, targets: Tensor, seq_lens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] or packed [N, V] → log-prob [S] and number of tokens [S] of each response."""
    if seq_lens is None:
        rows: Any = list(zip(logits, targets, strict=True))
    else:
        lens = seq_lens.tolist()
        rows = list(zip(logits.split(lens), targets.split(lens), strict=True))
    logps, lengths = [], []
    for row, tokens in rows:
        kept = tokens != IGNORE_INDEX
        logps.append(row_logprob(row[kept], tokens[kept])[0].sum())
        lengths.append(kept.sum())
    return torch.stack(logps), torch.stack(lengths)


def group_epilogue(
    logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor,
    layout: GroupLayout,
    loss: group_losses.BoundLoss,
    scores: Tensor | None = None,
) -> Tensor:
    """[S] vectors → group losses [G]."""
    groups = Groups(
        logps=layout.pad(logps),
        lengths=layout.pad(lengths.to(logps.dtype).clamp(min=1), fill=1.0),
        mask=layout.mask,
        ref_logps=None if ref_logps is None else layout.pad(ref_logps),
        scores=None if scores is None else layout.pad(scores),
    )
    return loss(groups)


def calibration_weights(prob: Tensor, form: str, alpha: float = 0.5, beta: float = 0.5, gamma: float = 1.0) -> Tensor:
    """Classifier probabilities of any shape → h, for one source of share β beside the target's α (formulas: DoRA)."""
    if form == "paper":
        return (gamma * prob / (alpha * (1 - prob) + 0.5) + gamma * prob / (beta * (1 - prob) + 0.5)) / 2
    if form == "mixture":
        return 1 / (alpha + beta * (1 - prob) / (gamma * prob))
    if form == "official":
        return 1 / (alpha + beta * (1 - prob) / prob)
    raise ValueError(f"form: expected paper, mixture or official, got {form!r}")


@singledispatch
def aggregate(robust: RobustObjective, losses: Tensor, calibration: Tensor) -> Tensor:
    """Group losses [G] and calibration [G] → the objective []; autograd goes through the closed form."""
    raise TypeError(f"robust: expected an objective with a closed form here, got {type(robust).__name__}")


@aggregate.register
def _(robust: Mean, losses: Tensor, calibration: Tensor) -> Tensor:
    return (calibration * losses).mean()


@aggregate.register
def _(robust: DrDPO, losses: Tensor, calibration: Tensor) -> Tensor:
    return -robust.beta * log_mean_exp(-calibration * losses / robust.beta)


@aggregate.register
def _(robust: KLRobust, losses: Tensor, calibration: Tensor) -> Tensor:
    if robust.calibration == "outside":
        inside = KLRobust(lam=robust.lam, radius=robust.radius)
        return calibration.mean() * aggregate(inside, losses, torch.ones_like(calibration))
    values = calibration * losses
    if robust.radius is None:
        assert robust.lam is not None
        return robust.lam * log_mean_exp(values / robust.lam)
    lam = _best_lambda(values.detach(), robust.radius)
    return lam * robust.radius + lam * log_mean_exp(values / lam)


@aggregate.register
def _(robust: CVaR, losses: Tensor, calibration: Tensor) -> Tensor:
    values = calibration * losses
    # Piecewise linear and convex in η: the least is at one of the values.
    return torch.stack([eta + (values - eta).clamp(min=0).mean() / robust.share for eta in values]).amin()


@aggregate.register
def _(robust: Chi2, losses: Tensor, calibration: Tensor) -> Tensor:
    values = calibration * losses
    spread = float(values.detach().amax() - values.detach().amin())

    def dual(eta: Tensor) -> Tensor:
        if robust.radius is not None:
            return math.sqrt(1 + 2 * robust.radius) * (values - eta).clamp(min=0).square().mean().sqrt() + eta
        assert robust.lam is not None
        return eta + (values - eta + robust.lam).clamp(min=0).square().mean() / (2 * robust.lam) - robust.lam / 2

    # Golden sections of the convex dual, which is flat at its least: a derivative in η there adds nothing.
    low, high = values.detach().amin() - 1e4 * (spread + 1), values.detach().amax() + (robust.lam or 0.0)
    for _step in range(300):
        left, right = high - (high - low) * _GOLDEN, low + (high - low) * _GOLDEN
        low, high = (low, right) if dual(left) < dual(right) else (left, high)
    return dual(((low + high) / 2).detach())


@aggregate.register
def _(robust: DomainBatch, losses: Tensor, calibration: Tensor) -> Tensor:
    values, none = calibration * losses, losses.new_zeros(())
    members = [robust.labels == domain for domain in range(len(robust.log_weights))]
    means = torch.stack([values[member].mean() if member.any() else none for member in members])
    weights = (robust.log_weights + robust.step_size * means.detach()).softmax(0)
    return (weights * means).sum()


_GOLDEN = (math.sqrt(5) - 1) / 2


def log_mean_exp(values: Tensor) -> Tensor:
    """The log of the mean of e^values."""
    return values.logsumexp(0) - math.log(len(values))


def _best_lambda(values: Tensor, radius: float) -> float:
    """The λ > 0 of least λρ + λ log mean e^{v/λ}, convex: bisection on KL(q_λ ‖ 1/G) = ρ, which falls with λ."""
    low, high = 1e-9, 1e9
    for _ in range(400):
        middle = math.sqrt(low * high)
        log_q = (values / middle).log_softmax(0)
        divergence = float((log_q.exp() * log_q).sum()) + math.log(len(values))
        low, high = (middle, high) if divergence > radius else (low, middle)
    return high


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    robust: RobustObjective,
    loss: str | Callable[..., Tensor] = "sigmoid",
    beta: float | None = None,
    group_size: int = 2,
    group_sizes: Tensor | None = None,
    seq_lens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    calibration: Tensor | None = None,
    scores: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    **options: Any,
) -> Tensor:
    """The loss [] of `robust_dpo.linear_preference_loss`, with all logits in memory; arguments as there."""
    logits = transformed_logits(hidden, weight, bias, softcap, logit_scale)
    logps, lengths = sequence_logps(logits, targets, seq_lens)
    if ref_hidden is not None and ref_weight is not None:
        ref_logits = transformed_logits(ref_hidden, ref_weight, ref_bias, softcap, logit_scale)
        ref_logps = sequence_logps(ref_logits, targets, seq_lens)[0].detach()
    layout = GroupLayout.build(len(logps), group_size, group_sizes, logps.device)
    values = group_epilogue(logps, ref_logps, lengths, layout, group_losses.resolve(loss, beta, options), scores)
    if calibration is None:
        calibration = torch.ones_like(values)
    elif len(calibration) == len(logps):
        calibration = layout.group_mean(calibration)
    return aggregate(robust, values, calibration.to(values.dtype))
