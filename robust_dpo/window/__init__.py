"""Exact robust weights for an optimizer step that is cut into micro-batches and spread over ranks.

`AccumulationWindow` is what a trainer holds. It takes the micro-batches of a step, and gives for each the loss to
backpropagate so that the step's gradient is that of the objective over all groups of all of them, on every rank.
"""

from robust_dpo.window.objective import BatchObjective, BatchSolution
from robust_dpo.window.route import ROUTES, SCOPES, RoutePlan, plan_route
from robust_dpo.window.supported import refuse_split_model, refuse_steps_in_backward, refuse_unknown_groups
from robust_dpo.window.table import GroupTable, layout_of
from robust_dpo.window.weighting import DomainLosses, MicroBatch, Weighed, Weighting, WindowSolution
from robust_dpo.window.window import AccumulationWindow, make_weighting

__all__ = [
    "ROUTES",
    "SCOPES",
    "AccumulationWindow",
    "BatchObjective",
    "BatchSolution",
    "DomainLosses",
    "GroupTable",
    "MicroBatch",
    "RoutePlan",
    "Weighed",
    "Weighting",
    "WindowSolution",
    "layout_of",
    "make_weighting",
    "plan_route",
    "refuse_split_model",
    "refuse_steps_in_backward",
    "refuse_unknown_groups",
]
