"""Calibration: the density ratio of target and mixture, and the classifier that it is estimated with."""

from robust_dpo.calibration.density_ratio import density_ratio, mixture_weights, paper_weights

__all__ = ["density_ratio", "mixture_weights", "paper_weights"]
