"""Calibrated, distributionally robust preference optimisation with fused kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from robust_dpo import calibration, official
from robust_dpo.backends import backends
from robust_dpo.groups import Groups
from robust_dpo.losses import available_losses, register_loss
from robust_dpo.ops import (
    SequenceLogps,
    linear_preference_loss,
    preference_loss,
    sequence_logps,
    sequence_logps_from_logits,
)
from robust_dpo.output import PreferenceOutput
from robust_dpo.robust import DrDPO, KLRobust, Mean, RobustObjective

if TYPE_CHECKING:
    from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer

__version__ = "0.1.0"

__all__ = [
    "DrDPO",
    "Groups",
    "KLRobust",
    "Mean",
    "PreferenceOutput",
    "RobustDPOConfig",
    "RobustDPOTrainer",
    "RobustObjective",
    "SequenceLogps",
    "available_losses",
    "backends",
    "calibration",
    "linear_preference_loss",
    "official",
    "preference_loss",
    "register_loss",
    "sequence_logps",
    "sequence_logps_from_logits",
]


def __getattr__(name: str) -> Any:
    """The trainer brings in transformers, which takes seconds; it is imported when it is first used."""
    if name in ("RobustDPOConfig", "RobustDPOTrainer"):
        return getattr(importlib.import_module("robust_dpo.trainer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
