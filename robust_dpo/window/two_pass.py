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

from robust_dpo.groups import GroupLayout
from robust_dpo.window.exchange import Exchange
from robust_dpo.window.objective import BatchObjective
from robust_dpo.window.ranks import Ranks
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
        self._layouts: list[GroupLayout] = []
        # Of each micro-batch [G, K + 2]: slopes, loss, weight.
        self._parts: list[Tensor] = []
        self._load_slopes: Tensor | None = None
        self._factor: Tensor | None = None
        self._solution: WindowSolution | None = None

    def open(self, model: nn.Module, window: Sequence[MicroBatch]) -> list[Batch]:
        self._window = window
        looks = [self._look(model, each.batch) for each in window]
        tables, self._layouts = [table for table, _ in looks], [layout for _, layout in looks]
        exchange = self._exchange(tables[0].groups.logps.device)
        whole = tables[0].of_tensor(exchange.whole(self._ranks, [table.to_tensor() for table in tables]))
        solution = self._objective.solve(whole)
        robust = solution.robust
        # Slopes that are not numbers must reach the loss, which stops the step, not the check of the operator.
        usable = solution.slopes.isfinite().all() & solution.value.isfinite()
        self._factor = torch.where(usable, float(self._ranks.num_processes), float("nan"))
        columns = [solution.slopes.where(usable, 0.0), solution.group_losses[:, None], robust.weights[:, None]]
        self._parts = exchange.own(self._ranks, torch.cat(columns, dim=1))
        self._load_slopes = solution.load_slopes
        counted = [part[:, -1] for part, each in zip(self._parts, window, strict=True) if each.counts]
        self._solution = WindowSolution(
            value=solution.value,
            ess=robust.ess,
            max_weight=robust.weights.amax(),
            parameter=robust.parameter,
            weights=torch.cat([robust.weights[:0], *counted]),
            terms=solution.terms,
            domain_losses=None
            if whole.labels is None
            else DomainLosses(solution.group_losses, whole.calibration, whole.labels),
        )
        references = [table.groups.ref_logps for table in tables]
        return [
            # So that the reference is not run again.
            each.batch if anchors is None else {**each.batch, "ref_logps": layout.unpad(anchors)}
            for each, anchors, layout in zip(window, references, self._layouts, strict=True)
        ]

    def run(self, model: nn.Module, batch: Batch, place: int) -> Weighed:
        assert self._factor is not None and self._solution is not None
        layout, part, counts = self._layouts[place], self._parts[place], self._window[place].counts
        slopes, losses, weights = part[:, :-2], part[:, -2], part[:, -1]
        # The same for all tokens, so that those without weight have to be told.
        load_slopes = None if self._load_slopes is None else self._load_slopes * counts
        output = self._forward(model, batch, layout.unpad(slopes), load_slopes)
        loss = output.loss * self._factor.to(output.loss)
        # A group that only training finds no number for has to be named as well.
        losses = losses.where(layout.pad(output.logps).isfinite().all(1), float("nan"))
        dtype = output.group_losses.dtype
        # The objective's, in place of what stood in for it.
        output = replace(
            output,
            loss=self._solution.value.to(output.loss),
            group_losses=losses.to(dtype),
            weights=weights.to(dtype),
            ess=self._solution.ess.to(dtype),
            parameter=self._solution.parameter.to(dtype),
        )
        return Weighed(loss, output, counts, self._solution if place == len(self._window) - 1 else None)

    def _exchange(self, device: torch.device) -> Exchange:
        """What the ranks have of the window. One read, on several ranks."""
        own = [
            (layout.num_groups, each.counts, layout.mask.shape[1])
            for layout, each in zip(self._layouts, self._window, strict=True)
        ]
        if self._ranks.num_processes == 1:
            return Exchange([own], device)
        return Exchange(self._ranks.gather(torch.tensor([own], device=device)).tolist(), device)
