"""The policy run on a batch: for its loss, or for its log-probs alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_dpo.errors import argument_error
from robust_dpo.expert_load import RouterPass
from robust_dpo.groups import GroupLayout
from robust_dpo.losses.linear import LINEAR
from robust_dpo.output import PreferenceOutput
from robust_dpo.robust import Mean
from robust_dpo.trainer.dropout import evaluating
from robust_dpo.trainer.metrics import seen_groups
from robust_dpo.trainer.reference import Reference
from robust_dpo.trainer.scoring import Batch, SequenceScorer
from robust_dpo.window import BatchObjective, GroupTable, layout_of


class PolicyForward:
    """Runs the policy, with all that the objective needs beside it.

    Args:
        scorer: runs the model.
        objective: of the run.
        reference: gives the log-probs that a batch does not bring; None where every batch does, or none is needed.
        accelerator: of the run.
        calibrated: whether the objective uses the calibration of the groups.
    """

    def __init__(
        self,
        scorer: SequenceScorer,
        objective: BatchObjective,
        reference: Reference | None,
        accelerator: Accelerator,
        *,
        calibrated: bool,
    ) -> None:
        self._scorer, self._objective, self._reference = scorer, objective, reference
        self._accelerator, self._calibrated = accelerator, calibrated

    def __call__(
        self, model: nn.Module, batch: Batch, slopes: Tensor | None = None, load_slopes: Tensor | None = None
    ) -> PreferenceOutput:
        """Loss, log-probs and robust weights of one batch by itself, without the SFT term and the routers' loss.

        Args:
            model: the policy, wrapped as it is trained.
            batch: what the collator gives, on the model's device.
            slopes: [S], for the loss Σ slopes · logp in place of the objective.
            load_slopes: [E], to add Σ load_slopes · (sum of the probabilities that the routers give an expert).
        """
        batch = self._scorer.laid_out(batch)
        arguments = self._own_objective(batch, model.training) if slopes is None else _linear(batch, slopes)
        routers: list[RouterPass] | None = None if load_slopes is None else []
        with self._accelerator.autocast():
            anchors = self._ref_logps(model, batch)
            # What a model gives may be no number, which is no mistake of a caller: it must reach the loss.
            known = None if anchors is None else anchors.where(anchors.isfinite(), 0.0)
            arguments |= {"ref_logps": known, "group_sizes": batch["group_sizes"]}
            output = self._scorer.preference_output(model, batch, arguments, routers)
            if routers and load_slopes is not None:
                output = replace(output, loss=output.loss + routers[0].weighted(load_slopes))
        return output if anchors is None else _anchored(output, anchors, batch["group_sizes"])

    def look(self, model: nn.Module, batch: Batch) -> tuple[GroupTable, GroupLayout]:
        """The groups of a batch with their log-probs, without gradients and dropout, and how they lie in it."""
        batch, routers = self._scorer.laid_out(batch), list[RouterPass]()
        with torch.no_grad(), evaluating(model), self._accelerator.autocast():
            ref_logps = self._ref_logps(model, batch)
            logps = self._scorer.logps(model, batch, routers)
            layout = layout_of(batch["group_sizes"], logps.device)
            groups = seen_groups(batch, layout, logps, ref_logps)
            load = routers[0].load() if routers else None
        return GroupTable(groups, self._calibration(batch), self._labels(batch), load), layout

    def _own_objective(self, batch: Batch, training: bool) -> dict[str, Any]:
        """Arguments of the operators for the objective of the run."""
        robust, labels = self._objective.robust, self._labels(batch)
        return {
            "loss": self._objective.loss,
            "robust": robust if labels is None else robust.at(labels, training=training),
            "calibration": self._calibration(batch),
            "scores": batch.get("scores"),
        }

    def _calibration(self, batch: Batch) -> Tensor | None:
        return batch["calibration"] if self._calibrated else None

    def _labels(self, batch: Batch) -> Tensor | None:
        """[G] int64, the domains of the groups by number, where the objective depends on them."""
        robust = self._objective.robust
        if not robust.needs_domains:
            return None
        if "domains" not in batch:
            expected = "one that gives `domains`, the name of each group's domain, as PreferenceCollator does"
            raise argument_error("data_collator", expected, f"a batch of {', '.join(batch)}")
        return robust.labels_of(batch["domains"]).to(batch["input_ids"].device, non_blocking=True)

    def _ref_logps(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """[S] of the batch's responses; what it brings comes first."""
        if not self._objective.loss.needs_reference:
            return None
        ref_logps: Tensor | None = batch.get("ref_logps")
        if ref_logps is not None:
            return ref_logps
        if self._reference is None:
            raise argument_error("eval_dataset", "rows with ref_logps, as the reference was not kept", "rows without")
        return self._reference.logps(model, batch)


def _linear(batch: Batch, slopes: Tensor) -> dict[str, Any]:
    """Arguments of the operators for Σ slopes · logp, the mean over G groups of G times it."""
    return {"loss": LINEAR, "robust": Mean(), "scores": (len(batch["group_sizes"]) * slopes).float()}


def _anchored(output: PreferenceOutput, ref_logps: Tensor, group_sizes: Tensor) -> PreferenceOutput:
    """The output with the reference's log-probs [S] as they are; where one is no number, neither is the loss."""
    ref_logps, unknown = ref_logps.to(output.logps), float("nan")
    finite = layout_of(group_sizes, ref_logps.device).pad(ref_logps).isfinite().all(1)
    return replace(
        output,
        loss=output.loss.where(finite.all(), unknown),
        group_losses=output.group_losses.where(finite, unknown),
        ref_logps=ref_logps,
        log_ratios=output.logps - ref_logps,
    )
