"""The robust preference loss from log-probs that the caller already has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robust_dpo import losses
from robust_dpo.errors import argument_error
from robust_dpo.groups import GroupLayout
from robust_dpo.ops import inputs
from robust_dpo.ops.objective import Responses, forget, group_responses, name_objective, named
from robust_dpo.output import PreferenceOutput
from robust_dpo.robust import RobustObjective


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    group_size: int = 2,
    group_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    loss: str | Callable[..., Tensor] | losses.BoundLoss = "sigmoid",
    beta: float | None = None,
    robust: str | RobustObjective = "mean",
    calibration: Tensor | None = None,
    scores: Tensor | None = None,
    log_normalizer: Tensor | None = None,
    **loss_options: Any,
) -> PreferenceOutput:
    """Robust preference loss of sequence log-probs, differentiable in `logps`.

    Args:
        logps: [S] floating, log-prob of each response under the policy, responses of a group adjacent.
        ref_logps: [S] the same under the reference, if the loss needs one.
        group_size: responses of every group (2: chosen, rejected).
        group_sizes: [G] integers, for groups of different sizes; `group_size` is then not used.
        lengths: [S] tokens of each response, for losses that average over tokens; without, 1.
        loss, beta, robust, calibration, scores, log_normalizer, **loss_options: as in `linear_preference_loss`.

    Returns:
        `PreferenceOutput`; only `.loss` is differentiable.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    if inputs.check_floating("logps", logps).ndim != 1:
        raise argument_error("logps", "shape [S]", list(logps.shape))
    device, count = logps.device, logps.shape[0]
    groups = inputs.count_groups(count, group_size, group_sizes, device)
    inputs.check_group_vectors(count, groups, device, ref_logps, calibration, scores, log_normalizer)
    lengths = torch.ones_like(logps) if lengths is None else inputs.check_lengths(lengths, count, device)
    if not torch.compiler.is_compiling():
        inputs.check_values(ref_logps, calibration, scores)
    # By name, as in the custom ops: torch.compile does not trace methods of an object that it made itself.
    name = name_objective(loss, beta, loss_options, robust, preference_loss)
    objective = named(name)
    forget(name)
    dtype = torch.promote_types(logps.dtype, torch.float32)
    layout = GroupLayout.build(count, group_size, group_sizes, device)
    values = logps.to(dtype)
    reference = None if ref_logps is None else ref_logps.detach().to(dtype)
    group_losses = objective.loss(group_responses(Responses(values, lengths, reference, scores), layout))
    solution = objective.solve(group_losses, inputs.group_calibration(calibration, layout, dtype), log_normalizer)
    return PreferenceOutput(
        loss=solution.attach(group_losses),
        logps=values.detach(),
        ref_logps=reference,
        log_ratios=None if reference is None else values.detach() - reference,
        group_losses=group_losses.detach(),
        weights=solution.weights,
        ess=solution.ess,
        parameter=solution.parameter,
        log_partition=solution.log_partition,
    )
