"""Calibration: the density ratio of target and mixture, and the classifier that it is estimated with."""

from robust_dpo.calibration.classifier import TextClassifier, fit_classifier
from robust_dpo.calibration.density_ratio import density_ratio, mixture_weights, paper_weights
from robust_dpo.calibration.probability import expected_calibration_error
from robust_dpo.calibration.reduce import group_calibration
from robust_dpo.calibration.report import CalibrationReport, Mixture
from robust_dpo.calibration.rows import calibrate_rows
from robust_dpo.calibration.stage import CalibrationResult, calibrate_dataset

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
