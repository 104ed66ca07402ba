"""Calibration: the density ratio of target and mixture, and the classifier that it is estimated with."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from robust_dpo.calibration.density_ratio import density_ratio, mixture_weights, paper_weights

if TYPE_CHECKING:
    from robust_dpo.calibration.classifier import TextClassifier, fit_classifier
    from robust_dpo.calibration.probability import expected_calibration_error
    from robust_dpo.calibration.reduce import group_calibration
    from robust_dpo.calibration.report import CalibrationReport, Mixture
    from robust_dpo.calibration.rows import calibrate_rows
    from robust_dpo.calibration.stage import CalibrationResult, calibrate_dataset

# The stage needs scikit-learn, whose import takes as long as torch's; training and `density_ratio` do without it.
_STAGE = {
    "CalibrationReport": "report",
    "CalibrationResult": "stage",
    "Mixture": "report",
    "TextClassifier": "classifier",
    "calibrate_dataset": "stage",
    "calibrate_rows": "rows",
    "expected_calibration_error": "probability",
    "fit_classifier": "classifier",
    "group_calibration": "reduce",
}

__all__ = [
    "CalibrationReport",
    "CalibrationResult",
    "Mixture",
    "TextClassifier",
    "calibrate_dataset",
    "calibrate_rows",
    "density_ratio",
    "expected_calibration_error",
    "fit_classifier",
    "group_calibration",
    "mixture_weights",
    "paper_weights",
]


def __getattr__(name: str) -> object:
    if name not in _STAGE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_STAGE[name]}"), name)
