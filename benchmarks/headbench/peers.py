"""Every implementation under test, each called the way its own documentation or trainer calls it.

An implementation is a builder: given a `Problem` it returns `loss(hidden, weight) -> Tensor []`, differentiable in
both. Builders import their package themselves, so a missing peer is left out without touching the others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headbench.problem import IGNORE, Problem, dpo_loss

LossFunction = Callable[[Tensor, Tensor], Tensor]
Builder = Callable[[Problem], LossFunction]


@dataclass(frozen=True)
class Implementation:
    """A way to compute the loss and its gradients.

    Args:
        name: the name on the command line and in tables.
        build: prepares a problem; what it does is not timed.
        package: module that must be importable.
        chosen_first: it wants all chosen sequences before all rejected ones, instead of pairs side by side.
        compiles: it runs through torch.compile.
        dtypes: input dtypes that it is measured at.
    """

    name: str
    build: Builder
    package: str = "torch"
    chosen_first: bool = False
    compiles: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    @property
    def available(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


@dataclass
class Bound:
    """An implementation with a problem in its hands, ready to be stepped."""

    loss: LossFunction
    hidden: Tensor
    weight: Tensor
    order: Tensor | None = field(default=None)

    @staticmethod
    def to(implementation: Implementation, problem: Problem) -> Bound:
        order = None
        if implementation.chosen_first:
            order = torch.arange(len(problem.targets)).view(-1, 2).t().flatten()
            problem = problem.take(order)
        hidden = problem.hidden.detach().requires_grad_()
        weight = problem.weight.detach().requires_grad_()
        return Bound(implementation.build(problem), hidden, weight, order)

    def step(self) -> Tensor:
        """One forward and backward; gradients are left on the leaves."""
        self.clear()
        loss = self.loss(self.hidden, self.weight)
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(dhidden [S, T, H] in the problem's own order, dweight [V, H]) of the last step."""
        dhidden, dweight = self.hidden.grad, self.weight.grad
        if dhidden is None or dweight is None:
            raise RuntimeError("no gradients: call step() first")
        return (dhidden if self.order is None else dhidden[self.order.argsort()]), dweight


IMPLEMENTATIONS: dict[str, Implementation] = {}


def register(
    name: str,
    package: str = "torch",
    *,
    chosen_first: bool = False,
    compiles: bool = False,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> Callable[[Builder], Builder]:
    """Add a builder to the registry."""

    def add(build: Builder) -> Builder:
        IMPLEMENTATIONS[name] = Implementation(name, build, package, chosen_first, compiles, dtypes)
        return build

    return add


def _select(names: list[str], dtype: torch.dtype) -> list[str]:
    return [name for name in names if dtype in IMPLEMENTATIONS[name].dtypes and IMPLEMENTATIONS[name].available]


def choose(wanted: str, dtype: torch.dtype) -> list[str]:
    """Names to run: "all", or a comma-separated list of registered names.

    Raises:
        ValueError: a name is not registered.
    """
    names = list(IMPLEMENTATIONS) if wanted == "all" else wanted.split(",")
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"--only: expected names out of {', '.join(IMPLEMENTATIONS)}, got {', '.join(unknown)}")
    return _select(names, dtype)


def _response_logps(hidden: Tensor, weight: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """Sequence log-probs [S] of response rows only; every sequence has the same number of them."""
    logits = hidden[mask] @ weight.t()
    token_logps = logits.float().log_softmax(1).gather(1, targets[:, None])[:, 0]
    return token_logps.view(len(mask), -1).sum(1)


def _plain(problem: Problem) -> LossFunction:
    mask = problem.targets != IGNORE
    targets = problem.targets[mask]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logps = _response_logps(problem.ref_hidden, problem.ref_weight, mask, targets)
        return dpo_loss(_response_logps(hidden, weight, mask, targets), ref_logps, problem.beta)

    return loss


@register("plain")
def plain(problem: Problem) -> LossFunction:
    """Eager PyTorch on response rows."""
    return _plain(problem)


@register("plain_compiled", compiles=True)
def plain_compiled(problem: Problem) -> LossFunction:
    """The same under torch.compile."""
    return torch.compile(_plain(problem))


@register("dora_authors")
def dora_authors(problem: Problem) -> LossFunction:
    """The DoRA authors' way: fp32 log-softmax of every position of every sequence, gather, mask, sum."""
    mask = problem.targets != IGNORE
    targets = problem.targets.clamp(min=0)

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        log_probs = (hidden @ weight.t()).float().log_softmax(-1)
        return (log_probs.gather(-1, targets[..., None])[..., 0] * mask).sum(1)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logps = logps(problem.ref_hidden, problem.ref_weight)
        return dpo_loss(logps(hidden, weight), ref_logps, problem.beta)

    return loss


@register("trl", "trl")
def trl(problem: Problem) -> LossFunction:
    """TRL's chunked head as DPOTrainer runs it away from Triton devices: every position is scored, labels clamped."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    mask = problem.targets != IGNORE
    targets = problem.targets.clamp(min=0).flatten()

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        token_logps: Tensor = ChunkedLogProbFunction.apply(
            hidden.flatten(0, 1), weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",)
        )[0]
        return token_logps.view(mask.shape).masked_fill(~mask, 0).sum(1)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logps = logps(problem.ref_hidden, problem.ref_weight)
        return dpo_loss(logps(hidden, weight), ref_logps, problem.beta)

    return loss


def _liger(problem: Problem, *, compiled: bool) -> LossFunction:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    head = LigerFusedLinearDPOLoss(beta=problem.beta, compiled=compiled, use_ref_model=True)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = head(
            weight, hidden, problem.targets, ref_input=problem.ref_hidden, ref_weight=problem.ref_weight
        )[0]
        return value

    return loss


@register("liger", "liger_kernel", chosen_first=True)
def liger(problem: Problem) -> LossFunction:
    """LigerFusedLinearDPOLoss(compiled=False): padded pairs, one pair per chunk."""
    return _liger(problem, compiled=False)


@register("liger_compiled", "liger_kernel", chosen_first=True, compiles=True)
def liger_compiled(problem: Problem) -> LossFunction:
    """LigerFusedLinearDPOLoss as it comes (compiled=True)."""
    return _liger(problem, compiled=True)


@register("cce", "cut_cross_entropy", compiles=True)
def cce(problem: Problem) -> LossFunction:
    """Apple's linear_cross_entropy(impl="torch_compile") per token; it drops the ignored rows itself."""
    from cut_cross_entropy import linear_cross_entropy

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        nll: Tensor = linear_cross_entropy(hidden, weight, problem.targets, impl="torch_compile", reduction="none")
        return -nll.sum(1)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logps = logps(problem.ref_hidden, problem.ref_weight)
        return dpo_loss(logps(hidden, weight), ref_logps, problem.beta)

    return loss


def _ours(problem: Problem, tile_dtype: torch.dtype | None = None) -> LossFunction:
    from robust_dpo import linear_preference_loss

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        output = linear_preference_loss(
            hidden,
            weight,
            problem.targets,
            group_size=2,
            ref_hidden=problem.ref_hidden,
            ref_weight=problem.ref_weight,
            loss="sigmoid",
            beta=problem.beta,
            tile_dtype=tile_dtype,
        )
        return output.loss

    return loss


@register("ours", "robust_dpo")
def ours(problem: Problem) -> LossFunction:
    """robust_dpo.linear_preference_loss as it comes."""
    return _ours(problem)


@register("ours_fp32_tile", "robust_dpo", dtypes=(torch.bfloat16,))
def ours_fp32_tile(problem: Problem) -> LossFunction:
    """The same with logits tiles in fp32."""
    return _ours(problem, tile_dtype=torch.float32)


@register("ours_bf16_tile", "robust_dpo", dtypes=(torch.bfloat16,))
def ours_bf16_tile(problem: Problem) -> LossFunction:
    """The same with logits tiles in bf16."""
    return _ours(problem, tile_dtype=torch.bfloat16)
