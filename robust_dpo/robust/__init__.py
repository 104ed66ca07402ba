"""Aggregations of group losses: the mean, and worst cases around it.

A new aggregation is one class in one file of this folder, registered with `register_objective`; import the file below.
"""

from robust_dpo.robust import chi2, cvar, group_dro, kl, mean
from robust_dpo.robust.base import ExponentialTilt, RobustObjective, Solution
from robust_dpo.robust.chi2 import Chi2
from robust_dpo.robust.cvar import CVaR
from robust_dpo.robust.group_dro import DomainBatch, GroupDRO
from robust_dpo.robust.kl import DrDPO, KLRobust
from robust_dpo.robust.mean import Mean
from robust_dpo.robust.modes import MODES, from_mode
from robust_dpo.robust.registry import available_objectives, register_objective, resolve

__all__ = [
    "MODES",
    "CVaR",
    "Chi2",
    "DomainBatch",
    "DrDPO",
    "ExponentialTilt",
    "GroupDRO",
    "KLRobust",
    "Mean",
    "RobustObjective",
    "Solution",
    "available_objectives",
    "chi2",
    "cvar",
    "from_mode",
    "group_dro",
    "kl",
    "mean",
    "register_objective",
    "resolve",
]
