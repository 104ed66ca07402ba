"""Slopes first, from a pass without gradients over the whole window; then training on log-probs with known weights.

The objective of the global batch, whatever it couples, has one derivative ∂L/∂logp for each response. With those the
window trains on Σ ∂L/∂logp · logp, which has its gradient and falls apart into micro-batches. Costs another forward
pass of the policy. The derivatives are taken where the model is without dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from robust_dpo.window.objective import BatchObjective, BatchSolution
from robust_dpo.window.ranks import Ranks
from robust_dpo.window.table import PRESENT, GroupTable, padded_alike
from robust_dpo.window.weighting import Batch, DomainLosses, Forward, Look, MicroBatch, Weighed, WindowSolution


class TwoPass:
    """The route for every objective.

    Args:
        objective: of the run.
        forward: runs a micro-batch.
        look: runs it for its log-probs alone.
        ranks: that have groups of the global batch.
    """

    def __init__(self, objective: BatchObjective, forward: Forward, look: Look, ranks: Ranks) -> None:
        self._objective, self._forward, self._look, self._ranks = objective, forward, look, ranks
        self._window: Sequence[MicroBatch] = ()
        self._slopes: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._load_slopes: Tensor | None = None
        self._factor: Tensor | None = None
        self._solution: WindowSolution | None = None

    def open(self, model: nn.Module, window: Sequence[MicroBatch]) -> list[Batch]:
        self._window = window
        looks = [self._look(model, each.batch) for each in window]
        tables, layouts = [table for table, _ in looks], [layout for _, layout in looks]
        everyone = self._everyone(tables)
        real = everyone[..., 0, PRESENT] == 1
        whole = tables[0].of_tensor(everyone[real])
        solution = self._objective.solve(whole)
        # Slopes that are not numbers must reach the loss, which stops the step, not the check of the operator.
        usable = solution.slopes.isfinite().all() & solution.value.isfinite()
        self._factor = torch.where(usable, float(self._ranks.num_processes), float("nan"))
        slopes, losses, weights = self._own(solution, real)
        sizes = [layout.num_groups for layout in layouts]
        known = slopes.where(usable, 0.0)
        self._slopes = [layout.unpad(part) for layout, part in zip(layouts, known, strict=True)]
        self._load_slopes = solution.load_slopes
        self._losses = [part[:size] for part, size in zip(losses, sizes, strict=True)]
        counted = [part[:size] for part, size, each in zip(weights, sizes, window, strict=True) if each.counts]
        self._solution = WindowSolution(
            value=solution.value,
            ess=solution.robust.ess,
            max_weight=solution.robust.weights.amax(),
            parameter=solution.robust.parameter,
            weights=torch.cat([weights.new_empty(0), *counted]),
            terms=solution.terms,
            domain_losses=_domain_losses(whole, solution),
        )
        references = [table.groups.ref_logps for table in tables]
        return [
            # So that the reference is not run again.
            each.batch if anchors is None else {**each.batch, "ref_logps": layout.unpad(anchors)}
            for each, anchors, layout in zip(window, references, layouts, strict=True)
        ]

    def run(self, model: nn.Module, batch: Batch, place: int) -> Weighed:
        assert self._factor is not None
        slopes, losses, counts = self._slopes[place], self._losses[place], self._window[place].counts
        # The same for all tokens, so that those without weight have to be told.
        load_slopes = None if self._load_slopes is None else self._load_slopes * counts
        output = self._forward(model, batch, slopes, load_slopes)
        # Those of the objective, in place of what stood in for them.
        output = replace(output, group_losses=losses.to(output.group_losses.dtype))
        solution = self._solution if place == len(self._window) - 1 else None
        return Weighed(output.loss * self._factor.to(output.loss), output, counts, solution)

    def _everyone(self, tables: Sequence[GroupTable]) -> Tensor:
        """[n, ranks, G, K, C]: micro-batch before rank, the order in which the sampler dealt the groups.

        However they are cut, the real ones are then the same in the same order.
        """
        counts = [each.counts for each in self._window]
        own = padded_alike([table.to_tensor() * count for table, count in zip(tables, counts, strict=True)])
        for dim in (1, 2):
            own = self._ranks.pad_across_processes(own, dim=dim)
        everyone: Tensor = self._ranks.gather(own[None])
        return everyone.transpose(0, 1)

    def _own(self, solution: BatchSolution, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slopes [n, G, K], losses [n, G] and weights [n, G] of this rank; 0 where nothing counts."""
        columns = torch.cat([solution.slopes, solution.group_losses[:, None], solution.robust.weights[:, None]], dim=1)
        spread = columns.new_zeros(*real.shape, columns.shape[1])
        spread[real] = columns
        own = spread[:, self._ranks.process_index]
        return own[..., :-2], own[..., -2], own[..., -1]


def _domain_losses(table: GroupTable, solution: BatchSolution) -> DomainLosses | None:
    return None if table.labels is None else DomainLosses(solution.group_losses, table.calibration, table.labels)
