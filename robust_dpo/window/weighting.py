"""What a route gives for each micro-batch, and what is known of a step at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from robust_dpo.groups import GroupLayout
from robust_dpo.output import PreferenceOutput
from robust_dpo.window.table import GroupTable

Batch = dict[str, Any]


class Forward(Protocol):
    """Runs a micro-batch: by the objective of the run, or where there are `slopes` [S], by Σ slopes·logp.

    With `load_slopes` [E] the probabilities that its routers give each expert count that much as well.
    """

    def __call__(
        self, model: nn.Module, batch: Batch, slopes: Tensor | None = None, load_slopes: Tensor | None = None
    ) -> PreferenceOutput: ...


class Look(Protocol):
    """Runs a micro-batch for its log-probs and the load of its experts: no gradient, no dropout.

    Also says how its responses form groups.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[GroupTable, GroupLayout]: ...


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a window.

    Args:
        batch: what the collator made, without repeated groups.
        counts: False for one that is only run so that this rank keeps in step with others; it weighs nothing.
    """

    batch: Batch
    counts: bool


@dataclass(frozen=True)
class DomainLosses:
    """What moves an aggregation over domains on: the global batch's losses [G], h [G] or None, and labels [G] int64."""

    losses: Tensor
    calibration: Tensor | None
    labels: Tensor


@dataclass(frozen=True)
class WindowSolution:
    """The objective of one optimizer step; detached, the same on every rank unless the scope is a micro-batch.

    Args:
        value: [] the objective over the global batch.
        ess: [] effective sample size 1/Σq².
        max_weight: [] largest q.
        parameter: [] robustness in force.
        weights: [n] q of this rank's groups, in the order of its micro-batches.
        terms: [] each, what was added to the aggregation over groups, by the name that it is logged under.
        domain_losses: where the groups have domains.
    """

    value: Tensor
    ess: Tensor
    max_weight: Tensor
    parameter: Tensor
    weights: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    domain_losses: DomainLosses | None = None


@dataclass(frozen=True)
class Weighed:
    """A micro-batch that was run.

    Args:
        loss: [] to backpropagate; gradients add up over micro-batches and are averaged over ranks.
        output: of the forward pass.
        counts: whether its groups do.
        solution: of the window, at its last micro-batch; None before.
    """

    loss: Tensor
    output: PreferenceOutput
    counts: bool
    solution: WindowSolution | None


class Weighting(Protocol):
    """A route: `open` for each window, then `run` for each of its micro-batches, in order."""

    def open(self, model: nn.Module, window: Sequence[MicroBatch]) -> list[Batch]:
        """The batches to train on, in place of those of the window."""
        ...

    def run(self, model: nn.Module, batch: Batch, place: int) -> Weighed:
        """Run the batch at `place` of the window forward."""
        ...
