"""What the preference losses give back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PreferenceOutput:
    """The robust loss of a batch, and what it was made of.

    Only `loss` is differentiable; everything else is detached. Vectors are fp32, or float64 for float64 input.

    Args:
        loss: [] the aggregated loss; with a `log_normalizer`, the surrogate of this part of the batch.
        logps: [S] log-prob of each response under the policy, the sum over its tokens, in nats.
        ref_logps: [S] the same under the reference, or None where there is none.
        log_ratios: [S] logps − ref_logps, or None.
        group_losses: [G] ℓ, the loss of each group before calibration.
        weights: [G] q, the robust weights, of sum 1 over the batch that was normalised.
        ess: [] effective sample size 1/Σq².
        parameter: [] robustness in force (λ of the KL objectives; infinite for the mean).
        log_partition: [] float64, log Σ e^s over the groups of this call, for normalising over several calls.
    """

    loss: Tensor
    logps: Tensor
    ref_logps: Tensor | None
    log_ratios: Tensor | None
    group_losses: Tensor
    weights: Tensor
    ess: Tensor
    parameter: Tensor
    log_partition: Tensor

    def worst_groups(self, count: int = 5) -> Tensor:
        """[min(count, G)] int64, the groups of largest weight, the largest first."""
        return self.weights.topk(min(count, len(self.weights))).indices
