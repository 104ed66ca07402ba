"""Which way an objective's weights over the global batch are had."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import DistributedType

from robust_dpo.errors import argument_error
from robust_dpo.robust import ExponentialTilt, RobustObjective
from robust_dpo.window.objective import BatchObjective

ROUTES = ("auto", "one_pass", "two_pass")
SCOPES = ("global_batch", "micro_batch")


@dataclass(frozen=True)
class RoutePlan:
    """How the weights are had.

    Args:
        kind: "one_pass", "two_pass", or "in_one": the operator solves a batch that is one micro-batch.
        scope: one of SCOPES; the kind is that of each micro-batch by itself, or that of the global batch.
        reason: why it takes two passes; empty where it does not, or where that was asked for.
    """

    kind: str
    scope: str = "global_batch"
    reason: str = ""


def plan_route(
    objective: BatchObjective, scope: str, route: str, *, accelerator: Accelerator, micro_batches: int, sharded: bool
) -> RoutePlan:
    """The route of a run.

    Args:
        objective: of the run.
        scope: one of SCOPES.
        route: one of ROUTES; "auto" takes one pass where that is exact.
        accelerator: of the run.
        micro_batches: of an optimizer step.
        sharded: the model has parameters that ranks hold parts of, whoever has sharded them.

    Raises:
        ValueError: one pass is asked for and cannot be exact.
    """
    if route == "two_pass":
        return RoutePlan("two_pass", scope)
    reason = _why_no_tilt(objective) or (_why_not_rescaled(accelerator, sharded) if micro_batches > 1 else "")
    if scope == "global_batch" and not reason:
        return RoutePlan("one_pass")
    if _solved_in_one(objective, scope, micro_batches * accelerator.num_processes):
        return RoutePlan("in_one", scope)
    if route == "one_pass":
        raise argument_error("robust_route", f"'auto' or 'two_pass': {reason}", repr(route))
    return RoutePlan("two_pass", scope, reason)


def _solved_in_one(objective: BatchObjective, scope: str, parts: int) -> bool:
    """Whether the operator, which sees one micro-batch, gives what two passes give."""
    if objective.adds_terms:
        return False
    # Weights that jump where losses tie, as all of them do where the policy still is the reference, must not depend on
    # how the operator rounds: two passes compute both log-probs in the same way.
    return scope == "micro_batch" or (parts == 1 and _is_tilt(objective.robust))


def _why_no_tilt(objective: BatchObjective) -> str:
    """Why gradients of an objective cannot be accumulated before its weights are known; empty where they can."""
    if objective.router_coefficient > 0:
        return "the auxiliary loss of its routers couples all tokens of a step"
    if objective.sft_weight > 0:
        return "what sft_weight adds to the worst case has a scale of its own"
    if objective.loss.couples_groups:
        return f"the loss {objective.loss.name!r} couples the groups of a step"
    if _is_tilt(objective.robust):
        return ""
    return f"the groups of {objective.robust.key} are coupled by more than one normaliser"


def _is_tilt(robust: RobustObjective) -> bool:
    return robust.single_pass and isinstance(robust, ExponentialTilt)


def _why_not_rescaled(accelerator: Accelerator, sharded: bool) -> str:
    """Why accumulated gradients cannot be multiplied before they are reduced over ranks; empty where they can."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "DeepSpeed takes the gradients of each micro-batch away"
    if accelerator.distributed_type == DistributedType.FSDP or sharded:
        return "FSDP keeps the gradients of earlier micro-batches to itself"
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return "sync_each_batch reduces the gradients of each micro-batch over ranks"
    if accelerator.scaler is not None:
        return "activations in fp16 overflow under a loss that is not normalised yet"
    return ""
