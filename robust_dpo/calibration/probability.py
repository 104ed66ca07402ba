"""Turning a classifier's decision values into probabilities, and measuring how far they are from the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from robust_dpo.errors import argument_error

Floats = NDArray[np.float64]
Calibrator = Callable[[Floats], Floats]


def fit_platt(decisions: Floats, labels: NDArray[np.int64]) -> Calibrator:
    """Platt scaling: P = σ(a·decision + b), fitted to smoothed targets (Platt 1999): finite on separable data."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    soft = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    # a soft target t is the pair of hard targets 1 and 0 with weights t and 1 − t
    model = LogisticRegression(C=1e10, max_iter=1000).fit(
        np.tile(decisions, 2)[:, None],
        np.repeat([1, 0], len(labels)),
        sample_weight=np.concatenate([soft, 1 - soft]),
    )
    return lambda values: model.predict_proba(values[:, None])[:, 1]


def fit_isotonic(decisions: Floats, labels: NDArray[np.int64]) -> Calibrator:
    """Isotonic regression: the best non-decreasing step function; needs more samples than Platt scaling."""
    model = IsotonicRegression(out_of_bounds="clip").fit(decisions, labels)
    return model.predict  # type: ignore[no-any-return]  # scikit-learn is untyped


CALIBRATORS: dict[str, Callable[[Floats, NDArray[np.int64]], Calibrator]] = {
    "platt": fit_platt,
    "isotonic": fit_isotonic,
}


@dataclass(frozen=True)
class ReliabilityBin:
    """Samples whose predicted probability lies in [low, high).

    Args:
        low, high: edges of the bin; the last bin includes 1.
        count: samples in it.
        mean_probability: mean prediction, None where it is empty.
        frequency: share of samples that are of the target class, None where it is empty.
    """

    low: float
    high: float
    count: int
    mean_probability: float | None
    frequency: float | None


def reliability_bins(labels: ArrayLike, probs: ArrayLike, bins: int = 10) -> list[ReliabilityBin]:
    """Predicted against observed frequency in `bins` bins of equal width over [0, 1].

    Args:
        labels: [S], 0 or 1.
        probs: [S] P(label = 1), in [0, 1].

    Raises:
        ValueError: other values, different lengths, no samples, or no bins.
    """
    truth, predicted = np.asarray(labels), np.asarray(probs, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != predicted.shape or not truth.size:
        raise argument_error("probs", "as many values as labels, at least one", f"{predicted.shape} for {truth.shape}")
    if not np.isin(truth, (0, 1)).all():
        raise argument_error("labels", "zeros and ones", np.unique(truth)[:5])
    if not ((predicted >= 0) & (predicted <= 1)).all():
        raise argument_error("probs", "values in [0, 1]", [predicted.min(), predicted.max()])
    if bins < 1:
        raise argument_error("bins", "at least 1", bins)
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    prob_sums = np.bincount(index, weights=predicted, minlength=bins)
    label_sums = np.bincount(index, weights=truth, minlength=bins)
    return [
        ReliabilityBin(
            low=float(edges[b]),
            high=float(edges[b + 1]),
            count=int(counts[b]),
            mean_probability=float(prob_sums[b] / counts[b]) if counts[b] else None,
            frequency=float(label_sums[b] / counts[b]) if counts[b] else None,
        )
        for b in range(bins)
    ]


def expected_calibration_error(labels: ArrayLike, probs: ArrayLike, bins: int = 10) -> float:
    """Mean over samples of |mean prediction − frequency of the target| in their bin (Naeini et al. 2015), in [0, 1].

    Arguments and errors as for `reliability_bins`.
    """
    filled = [b for b in reliability_bins(labels, probs, bins) if b.count]
    gaps = [b.count * abs((b.mean_probability or 0.0) - (b.frequency or 0.0)) for b in filled]
    return sum(gaps) / sum(b.count for b in filled)
