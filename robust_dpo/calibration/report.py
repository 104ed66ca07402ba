"""How good the classifier is and what its probabilities become: numbers (strict JSON) and one figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from robust_dpo.calibration.probability import ReliabilityBin, expected_calibration_error, reliability_bins
from robust_dpo.errors import argument_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 10
HISTOGRAM_BINS = 30


@dataclass(frozen=True)
class Mixture:
    """What the data is made of, as `density_ratio` needs it.

    Args:
        alpha: share of the target among the responses.
        betas: share of each other source; with alpha they sum to 1.
        gammas: n_source / n_target among the responses that the classifier learnt from.
    """

    alpha: float
    betas: dict[str, float]
    gammas: dict[str, float]

    @property
    def beta(self) -> float:
        """Share of all other sources together."""
        return sum(self.betas.values())

    @property
    def gamma(self) -> float:
        """n_other / n_target of the pooled classifier."""
        return sum(self.gammas.values())

    def options(self, form: str) -> dict[str, float]:
        """Arguments of `density_ratio` for one pooled probability per response; `official` has its own constants."""
        return {} if form == "official" else {"alpha": self.alpha, "betas": self.beta, "gammas": self.gamma}


@dataclass(frozen=True)
class Spread:
    """Distribution of h in one kind of response or group.

    Args:
        count: number of values.
        mean: their mean.
        quantiles: the 5, 25, 50, 75 and 95 % quantiles.
        histogram: counts in the report's `histogram_edges`.
    """

    count: int
    mean: float
    quantiles: tuple[float, ...]
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class CalibrationReport:
    """What came of a calibration.

    Args:
        settings: how it was made: target, classifier, folds, seed, form of h, reduction to groups, ...
        counts: labelled responses of each kind.
        mixture: proportions and class imbalance.
        auc: area under the ROC curve of the cross-fitted probabilities, 0.5 is chance; of labelled responses only, as
            the next three.
        brier: mean squared error of the probabilities.
        log_loss: mean negative log-likelihood, nats.
        expected_calibration_error: see `probability.expected_calibration_error`, 10 bins.
        reliability: predicted against observed frequency.
        h_by_kind: distribution of h over the responses of each source (or chosen and rejected).
        histogram_edges: edges of the histograms of h.
        num_groups: G.
        ess: effective number of groups under weights h, (Σh)²/Σh², between 1 and G.
        corruption: where the data has a column `corrupted`: mean group calibration of clean and corrupted groups, and
            the probability that a clean group has a higher one than a corrupted group (`auc`, 0.5 is chance).
    """

    settings: dict[str, Any]
    counts: dict[str, int]
    mixture: Mixture
    auc: float
    brier: float
    log_loss: float
    expected_calibration_error: float
    reliability: list[ReliabilityBin]
    h_by_kind: dict[str, Spread]
    histogram_edges: tuple[float, ...]
    num_groups: int
    ess: float
    corruption: dict[str, float] | None = None

    @property
    def ess_fraction(self) -> float:
        """`ess` as a share of the groups, in (0, 1]."""
        return self.ess / self.num_groups

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, lists and dicts; every number is finite."""
        return {**asdict(self), "ess_fraction": self.ess_fraction}

    def save(self, directory: str | Path) -> list[Path]:
        """Writes calibration.json and calibration.png into `directory`, which is made where it does not exist.

        Returns:
            The two paths.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        numbers, figure = folder / "calibration.json", folder / "calibration.png"
        numbers.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        self.plot(figure)
        return [numbers, figure]

    def plot(self, path: str | Path) -> None:
        """Draws the reliability diagram and the histograms of h; the suffix of `path` names the format."""
        # matplotlib takes a second to import; a report that is only computed does not wait for it
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        from robust_dpo.reporting.plots import STYLE

        with rc_context(STYLE):
            figure = Figure(figsize=(11.5, 4.6), layout="constrained")
            left, right = figure.subplots(1, 2)
            self._draw_reliability(left)
            self._draw_histograms(right)
            figure.savefig(path)

    def _draw_reliability(self, axes: Axes) -> None:
        from robust_dpo.reporting.plots import COLOURS

        filled = [b for b in self.reliability if b.count]
        most = max(b.count for b in filled)
        axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfectly calibrated")
        for b in filled:
            # the strip at the bottom says how many responses stand behind each point
            axes.bar((b.low + b.high) / 2, 0.18 * b.count / most, width=(b.high - b.low) * 0.92, color="0.85", zorder=0)
        axes.plot(
            [b.mean_probability or 0.0 for b in filled],
            [b.frequency or 0.0 for b in filled],
            marker="o",
            color=COLOURS[0],
            label="classifier, cross-fitted",
        )
        axes.bar([0], [0], color="0.85", label=f"responses per bin (tallest: {most:,})")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted P(target)", ylabel="observed share of target responses")
        axes.set_title(f"Reliability: AUC {self.auc:.3f}, ECE {self.expected_calibration_error:.3f}")
        axes.legend(loc="upper left")

    def _draw_histograms(self, axes: Axes) -> None:
        from robust_dpo.reporting.plots import COLOURS

        for (kind, spread), colour in zip(self.h_by_kind.items(), COLOURS * len(self.h_by_kind), strict=False):
            shares = [100 * count / spread.count for count in spread.histogram]
            label = f"{kind} (n = {spread.count:,}, mean {spread.mean:.2f})"
            axes.stairs(shares, self.histogram_edges, color=colour, fill=True, alpha=0.25)
            axes.stairs(shares, self.histogram_edges, color=colour, linewidth=1.6, label=label)
        axes.axvline(1, color="0.6", linestyle="--", linewidth=1)
        axes.set(
            xlabel="calibration h of a response (density ratio target / mixture)",
            ylabel="share of the kind's responses, %",
        )
        axes.set_title(
            f"Calibration by source: ESS {self.ess:,.0f} of {self.num_groups:,} groups ({self.ess_fraction:.0%})"
        )
        axes.legend(loc="upper center")


def build_report(
    *,
    labels: ArrayLike,
    probs: ArrayLike,
    counts: Mapping[str, int],
    kinds: Sequence[str],
    h: ArrayLike,
    group_h: ArrayLike,
    mixture: Mixture,
    settings: Mapping[str, Any],
    corrupted: Sequence[bool] | None = None,
) -> CalibrationReport:
    """Computes the report.

    Args:
        labels: [N], 1 target, 0 other, −1 not labelled; golden responses included.
        probs: [N] P(target), in (0, 1).
        counts: labelled responses of each kind.
        kinds: [S] what the histograms of h are split by.
        h: [S] ≥ 0, calibration of each response.
        group_h: [G] ≥ 0, calibration of each group.
        mixture: proportions of the data.
        settings: values that JSON can hold.
        corrupted: [G], for data whose wrong labels are known.

    Raises:
        ValueError: the labelled responses are all of one class, or every group has calibration 0.
    """
    truth, predicted = np.asarray(labels), np.asarray(probs, dtype=np.float64)
    labelled = truth >= 0
    truth, predicted = truth[labelled], predicted[labelled]
    if len(np.unique(truth)) != 2:
        raise argument_error("labels", "responses of both classes", np.unique(truth).tolist())
    groups, responses, names = np.asarray(group_h, dtype=np.float64), np.asarray(h, dtype=np.float64), np.asarray(kinds)
    if not groups.sum() > 0:
        raise argument_error("group_h", "a group with positive calibration", "zeros")
    edges = _edges(responses)
    return CalibrationReport(
        settings=dict(settings),
        counts=dict(counts),
        mixture=mixture,
        auc=float(roc_auc_score(truth, predicted)),
        brier=float(brier_score_loss(truth, predicted)),
        log_loss=float(log_loss(truth, predicted)),
        expected_calibration_error=expected_calibration_error(truth, predicted, BINS),
        reliability=reliability_bins(truth, predicted, BINS),
        h_by_kind={str(kind): _spread(responses[names == kind], edges) for kind in np.unique(names)},
        histogram_edges=tuple(edges.tolist()),
        num_groups=len(groups),
        ess=float(groups.sum() ** 2 / (groups**2).sum()),
        corruption=None if corrupted is None else _corruption(groups, np.asarray(corrupted, dtype=bool)),
    )


def _edges(h: NDArray[np.float64]) -> NDArray[np.float64]:
    """Histogram edges from 0 to the largest value; the last bin includes it."""
    return np.linspace(0, max(float(h.max()), 1.0), HISTOGRAM_BINS + 1)


def _spread(h: NDArray[np.float64], edges: NDArray[np.float64]) -> Spread:
    counts, _ = np.histogram(h, edges)
    return Spread(
        count=len(h),
        mean=float(h.mean()),
        quantiles=tuple(np.quantile(h, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()),
        histogram=tuple(counts.tolist()),
    )


def _corruption(group_h: NDArray[np.float64], corrupted: NDArray[np.bool_]) -> dict[str, float] | None:
    if corrupted.all() or not corrupted.any():
        return None
    return {
        "share": float(corrupted.mean()),
        "mean_h_clean": float(group_h[~corrupted].mean()),
        "mean_h_corrupted": float(group_h[corrupted].mean()),
        "auc": float(roc_auc_score(~corrupted, group_h)),
    }
