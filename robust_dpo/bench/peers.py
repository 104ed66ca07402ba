"""The peers, each called the way its own documentation or trainer calls it, and PyTorch by itself."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from robust_dpo.bench.implementation import ANYWHERE, CPU_ONLY, GPU_ONLY, Implementation, LossFunction, add, from_logps
from robust_dpo.bench.problem import IGNORE, Problem


def plain(problem: Problem) -> LossFunction:
    """Eager PyTorch on response rows; every sequence has the same number of them."""
    mask = problem.targets != IGNORE
    targets = problem.targets[mask]

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden[mask] @ weight.t()
        token_logps = logits.float().log_softmax(1).gather(1, targets[:, None])[:, 0]
        return token_logps.view(len(mask), -1).sum(1)

    return logps


def plain_compiled(problem: Problem) -> LossFunction:
    """The whole loss of `plain` under torch.compile."""
    return torch.compile(from_logps(plain)(problem))


def dora_authors(problem: Problem) -> LossFunction:
    """The DoRA authors' way: fp32 log-softmax of every position of every sequence, gather, mask, sum."""
    mask = problem.targets != IGNORE
    targets = problem.targets.clamp(min=0)

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        log_probs = (hidden @ weight.t()).float().log_softmax(-1)
        return (log_probs.gather(-1, targets[..., None])[..., 0] * mask).sum(1)

    return logps


def trl(problem: Problem) -> LossFunction:
    """TRL's chunked head as its DPOTrainer runs it.

    Where Triton runs, response rows are scored and scattered back; elsewhere every position is, with clamped labels.
    """
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    mask = problem.targets != IGNORE
    compact = problem.weight.is_cuda
    targets = problem.targets[mask] if compact else problem.targets.clamp(min=0).flatten()

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden[mask] if compact else hidden.flatten(0, 1)
        token_logps: Tensor = ChunkedLogProbFunction.apply(
            rows, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",)
        )[0]
        if compact:
            return token_logps.new_zeros(mask.shape).masked_scatter(mask, token_logps).sum(1)
        return token_logps.view(mask.shape).masked_fill(~mask, 0).sum(1)

    return logps


def _liger_dpo(problem: Problem, *, compiled: bool) -> LossFunction:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    head = LigerFusedLinearDPOLoss(beta=problem.beta, compiled=compiled, use_ref_model=True)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = head(
            weight, hidden, problem.targets, ref_input=problem.ref_hidden, ref_weight=problem.ref_weight
        )[0]
        return value

    return loss


def liger(problem: Problem) -> LossFunction:
    """LigerFusedLinearDPOLoss(compiled=False): padded pairs, one pair per chunk."""
    return _liger_dpo(problem, compiled=False)


def liger_compiled(problem: Problem) -> LossFunction:
    """LigerFusedLinearDPOLoss as it comes (compiled=True)."""
    return _liger_dpo(problem, compiled=True)


def liger_ce(problem: Problem) -> LossFunction:
    """Liger's fused linear cross-entropy per token (reduction="none"), which computes the logits again in backward."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    head = LigerFusedLinearCrossEntropyLoss(reduction="none")

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        nll: Tensor = head(weight, hidden.flatten(0, 1), problem.targets.flatten())
        return -nll.view(problem.targets.shape).sum(1)

    return logps


def liger_mean_ce(problem: Problem) -> LossFunction:
    """Liger's fused linear cross-entropy as it comes (reduction="mean"): gradients in forward, another loss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    head = LigerFusedLinearCrossEntropyLoss()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = head(weight, hidden.flatten(0, 1), problem.targets.flatten())
        return value

    return loss


def cce(problem: Problem) -> LossFunction:
    """Apple's linear_cross_entropy per token, with its Triton kernels on a GPU; it drops the ignored rows itself."""
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if problem.weight.is_cuda else "torch_compile"

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        nll: Tensor = linear_cross_entropy(hidden, weight, problem.targets, impl=implementation, reduction="none")
        return -nll.sum(1)

    return logps


def quack_mean_ce(problem: Problem) -> LossFunction:
    """Quack's chunked linear cross-entropy (mean over tokens) with its tuned kernels: another loss."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    targets = problem.targets.flatten()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = chunked_linear_cross_entropy(hidden.flatten(0, 1), weight, targets, ignore_index=IGNORE)
        return value

    return loss


_LIGER = ("liger_kernel", "liger-kernel")
_liger_dpo_peer = partial(
    Implementation,
    package="liger_kernel",
    distribution="liger-kernel",
    chosen_first=True,
    pairs_only=True,
    live_only=True,
)

add(Implementation("plain", from_logps(plain)))
add(Implementation("plain_compiled", plain_compiled, compiles_on=ANYWHERE))
add(Implementation("dora_authors", from_logps(dora_authors)))
add(Implementation("trl", from_logps(trl), "trl", "trl"))
add(_liger_dpo_peer("liger", liger))
add(_liger_dpo_peer("liger_compiled", liger_compiled, compiles_on=ANYWHERE))
add(Implementation("liger_ce", from_logps(liger_ce), *_LIGER, devices=GPU_ONLY))
add(Implementation("liger_mean_ce", liger_mean_ce, *_LIGER, objective="cross_entropy", devices=GPU_ONLY))
add(Implementation("cce", from_logps(cce), "cut_cross_entropy", "cut-cross-entropy", compiles_on=CPU_ONLY))
add(
    Implementation(
        "quack_mean_ce",
        quack_mean_ce,
        "quack",
        "quack-kernels",
        objective="cross_entropy",
        dtypes=(torch.bfloat16,),
        devices=GPU_ONLY,
    )
)
