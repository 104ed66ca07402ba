"""The window of micro-batches between two optimizer steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn

from robust_dpo.errors import type_error
from robust_dpo.robust import ExponentialTilt
from robust_dpo.window.alone import Alone
from robust_dpo.window.in_one import InOne
from robust_dpo.window.objective import BatchObjective
from robust_dpo.window.one_pass import OnePass
from robust_dpo.window.ranks import OneRank
from robust_dpo.window.real_groups import first_seen, kept
from robust_dpo.window.route import RoutePlan
from robust_dpo.window.two_pass import TwoPass
from robust_dpo.window.weighting import Batch, Forward, Look, MicroBatch, Weighed, Weighting

logger = logging.getLogger(__name__)


def make_weighting(
    plan: RoutePlan, objective: BatchObjective, forward: Forward, look: Look, accelerator: Accelerator
) -> Weighting:
    """The route that was planned."""
    if plan.kind == "one_pass":
        assert isinstance(objective.robust, ExponentialTilt)
        return OnePass(objective.robust, forward, accelerator)
    alone = plan.scope == "micro_batch"
    in_two = TwoPass(objective, forward, look, OneRank() if alone else accelerator)
    route = in_two if plan.kind == "two_pass" else InOne(forward)
    return Alone(route) if alone else route


class AccumulationWindow:
    """Follows the micro-batches of a training loop from one optimizer step to the next.

    Args:
        weighting: the route.
        accelerator: of the run.
        prepare: moves a batch to the device.
        drop_last: whether the data end with the last full round of batches.
        keeps_gradients: the gradients of micro-batches are where `zero_grad` does not reach them until the last one, as
            under FSDP and DeepSpeed.
    """

    def __init__(
        self,
        weighting: Weighting,
        accelerator: Accelerator,
        prepare: Callable[[Batch], Batch],
        *,
        drop_last: bool,
        keeps_gradients: bool,
    ) -> None:
        self._weighting, self._accelerator, self._prepare = weighting, accelerator, prepare
        self._drop_last, self._keeps_gradients = drop_last, keeps_gradients
        self._size = self._place = 0

    @property
    def is_open(self) -> bool:
        """Whether micro-batches of an optimizer step are still to come."""
        return self._place < self._size

    def open(self, model: nn.Module, batches: list[Batch], wanted: int) -> list[Batch]:
        """Begin a step.

        Args:
            model: the policy, wrapped as it is trained.
            batches: that the loader gave for the step.
            wanted: how many the step was to have. Where the data ended before, the step is filled up with micro-batches
                that weigh nothing: otherwise it would not be taken, and its gradients would be part of the next.

        Returns:
            `wanted` batches to train on, or none.

        Raises:
            RuntimeError: the step before was left in its middle, and its gradients cannot be taken back.
        """
        if self.is_open:
            # The loop was left in the middle of a step.
            if self._keeps_gradients:
                raise RuntimeError(
                    "a step was left after some of its micro-batches, and FSDP and DeepSpeed would add their gradients "
                    "to the next; end epochs after steps (on_step_end)"
                )
            model.zero_grad()
        self._place = self._size = 0
        if not batches:
            return []
        groups = self._groups()
        window = [kept(self._prepare(batch), len(batch["group_sizes"])) for batch in batches[:-1]]
        window.append(self._last(self._prepare(batches[-1]), groups))
        empty = kept(window[-1].batch, 0)
        window += [empty] * (wanted - len(window))
        self._size = len(window)
        return self._weighting.open(model, window)

    def run(self, model: nn.Module, batch: Batch) -> Weighed:
        """Run the next micro-batch forward. Its loss takes account of the number of them in no way."""
        weighed = self._weighting.run(model, batch, self._place)
        self._place += 1
        return weighed

    def _groups(self) -> int | None:
        """Groups of an epoch where the loader repeats some of them, to fill up the last round of batches."""
        state: Any = self._accelerator.gradient_state
        if self._accelerator.num_processes == 1 or self._drop_last or not state.in_dataloader:
            return None
        dataset = state.active_dataloader.dataset
        if not hasattr(dataset, "__len__"):
            raise type_error("train_dataset", "a data set of known length on several ranks", dataset)
        return len(dataset)

    def _last(self, batch: Batch, groups: int | None) -> MicroBatch:
        """The last batch of a window; without what is repeated, where it is that of an epoch of `groups`."""
        size = len(batch["group_sizes"])
        if groups is None or not self._accelerator.gradient_state.end_of_dataloader:
            return kept(batch, size)
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        return kept(batch, first_seen(groups, size, rank, ranks))
