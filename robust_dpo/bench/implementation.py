"""What an implementation of the problem is, the registry of them, and one of them with a problem in its hands.

An implementation is a builder: given a `Problem` it returns `loss(hidden, weight) -> Tensor []`, differentiable in
both. Builders import their package themselves, so a missing peer is left out without touching the others.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.bench.problem import Problem
from robust_dpo.bench.solution import Objective
from robust_dpo.errors import argument_error

LossFunction = Callable[[Tensor, Tensor], Tensor]
Builder = Callable[[Problem], LossFunction]
# (hidden [S, T, H], weight [V, H]) -> logps [S], from which any preference loss can be put together.
LogpsBuilder = Callable[[Problem], LossFunction]

ANYWHERE = frozenset({"cpu", "cuda"})
CPU_ONLY = frozenset({"cpu"})
GPU_ONLY = frozenset({"cuda"})


@dataclass(frozen=True)
class Implementation:
    """A way to compute the loss and its gradients.

    Args:
        name: the name on the command line and in tables.
        build: prepares a problem; what it does is not timed.
        package: module that must be importable.
        distribution: what the package is called on an index, for its version.
        objective: what it computes: the problem's loss, or the cross-entropy, for the same matrix products.
        chosen_first: it wants all chosen sequences before all rejected ones, instead of pairs side by side.
        pairs_only: it knows no groups of more than two.
        live_only: it takes hidden states of the reference, and no cached log-probs.
        compiles_on: types of device where it runs through torch.compile, which takes a minute before the first result.
        dtypes: input dtypes that it is measured at.
        devices: types of device that it runs on.
        tile_dtype: that logits surely have when they meet the softmax; None: maybe that of the inputs.
        ours: whether it is of this package.
    """

    name: str
    build: Builder
    package: str = "torch"
    distribution: str = "torch"
    objective: Objective = "preference"
    chosen_first: bool = False
    pairs_only: bool = False
    live_only: bool = False
    compiles_on: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    devices: frozenset[str] = ANYWHERE
    tile_dtype: torch.dtype | None = None
    ours: bool = False

    @property
    def available(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """Of its distribution; of the module where there is no metadata (a folder on PYTHONPATH)."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return str(getattr(sys.modules.get(self.package), "__version__", "unknown"))

    def obstacle(self, problem: Problem) -> str | None:
        """Why it does not go with the problem; None if it does."""
        device = problem.weight.device.type
        if device not in self.devices:
            return f"it runs on {', '.join(sorted(self.devices))}, not on {device}"
        if problem.dtype not in self.dtypes:
            return f"it is not a choice for {problem.dtype} inputs"
        if self.pairs_only and problem.group_size != 2:
            return f"it takes pairs, not groups of {problem.group_size}"
        if self.live_only and not problem.live_reference:
            return "it takes no cached log-probs of the reference"
        if self.objective == "cross_entropy" and problem.live_reference:
            return "the cross-entropy has no reference"
        return None


IMPLEMENTATIONS: dict[str, Implementation] = {}


def add(implementation: Implementation) -> Implementation:
    """Put an implementation into the registry, or replace the one of its name."""
    IMPLEMENTATIONS[implementation.name] = implementation
    return implementation


def choose(wanted: str | Iterable[str]) -> list[Implementation]:
    """Those asked for whose package can be imported: "all", or registered names, comma-separated or one by one.

    Raises:
        ValueError: a name is not registered.
    """
    names = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    names = list(IMPLEMENTATIONS) if names == ["all"] else names
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown:
        raise argument_error("implementations", f"names out of {', '.join(IMPLEMENTATIONS)}", ", ".join(unknown))
    return [IMPLEMENTATIONS[name] for name in names if IMPLEMENTATIONS[name].available]


def from_logps(build: LogpsBuilder) -> Builder:
    """A loss out of differentiable sequence log-probs, as trainers put it together: reference first, without graph."""

    def build_loss(problem: Problem) -> LossFunction:
        logps = build(problem)

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            ref_logps = problem.ref_logps
            if ref_logps is None:
                assert problem.ref_hidden is not None and problem.ref_weight is not None
                with torch.no_grad():
                    ref_logps = logps(problem.ref_hidden, problem.ref_weight)
            return problem.loss(logps(hidden, weight), ref_logps)

        return loss

    return build_loss


@dataclass
class Bound:
    """An implementation with a problem in its hands, ready to be stepped."""

    loss: LossFunction
    hidden: Tensor
    weight: Tensor
    order: Tensor | None = None

    @staticmethod
    def to(implementation: Implementation, problem: Problem) -> Bound:
        order = None
        if implementation.chosen_first:
            order = torch.arange(len(problem.targets), device=problem.targets.device).view(-1, 2).t().flatten()
            problem = problem.take(order)
        hidden = problem.hidden.detach().requires_grad_()
        weight = problem.weight.detach().requires_grad_(problem.train_head)
        return Bound(implementation.build(problem), hidden, weight, order)

    def step(self) -> Tensor:
        """One forward and backward; gradients are left on the leaves."""
        self.clear()
        loss = self.loss(self.hidden, self.weight)
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """(dhidden [S, T, H] in the problem's own order, dweight [V, H] or None) of the last step."""
        dhidden, dweight = self.hidden.grad, self.weight.grad
        if dhidden is None or (dweight is None and self.weight.requires_grad):
            raise RuntimeError("no gradients: call step() first")
        return (dhidden if self.order is None else dhidden[self.order.argsort()]), dweight
