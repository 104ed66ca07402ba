"""Preference losses: a registry of pure functions from `Groups` to one loss per group [G].

A new loss is one function, decorated with `register_loss`, in one file of this folder; import the file below.
"""

from robust_dpo.checks import Interval
from robust_dpo.losses import likelihood, listwise, pairwise, transport
from robust_dpo.losses.pairs import Pair, pairwise_loss, ranked_pairs
from robust_dpo.losses.registry import BoundLoss, UnknownOption, available_losses, register_loss, resolve

__all__ = [
    "BoundLoss",
    "Interval",
    "Pair",
    "UnknownOption",
    "available_losses",
    "likelihood",
    "listwise",
    "pairwise",
    "pairwise_loss",
    "ranked_pairs",
    "register_loss",
    "resolve",
    "transport",
]
