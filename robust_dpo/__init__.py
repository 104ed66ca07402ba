"""Calibrated, distributionally robust preference optimisation with fused kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_dpo import calibration, official
    from robust_dpo.dispatch import backends
    from robust_dpo.groups import Groups
    from robust_dpo.losses import available_losses, register_loss
    from robust_dpo.ops.linear_preference_loss import linear_preference_loss
    from robust_dpo.ops.preference_loss import preference_loss
    from robust_dpo.ops.sequence_logps import SequenceLogps, sequence_logps, sequence_logps_from_logits
    from robust_dpo.output import PreferenceOutput
    from robust_dpo.robust import DrDPO, KLRobust, Mean, RobustObjective
    from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer

__version__ = "0.6.0"

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

# Name -> module that defines it, or itself for a submodule. Importing torch takes seconds and transformers more, so
# both wait until a name is used: `robust-dpo --help` needs neither.
_HOMES = {
    "DrDPO": "robust",
    "Groups": "groups",
    "KLRobust": "robust",
    "Mean": "robust",
    "PreferenceOutput": "output",
    "RobustDPOConfig": "trainer",
    "RobustDPOTrainer": "trainer",
    "RobustObjective": "robust",
    "SequenceLogps": "ops",
    "available_losses": "losses",
    "backends": "dispatch",
    "calibration": "calibration",
    "linear_preference_loss": "ops",
    "official": "official",
    "preference_loss": "ops",
    "register_loss": "losses",
    "sequence_logps": "ops",
    "sequence_logps_from_logits": "ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = module if name in ("calibration", "official") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
