"""The calibration stage: from canonical rows to rows with `probs`, and a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from robust_dpo.calibration.classifier import ClassifierFactory, cross_fit
from robust_dpo.calibration.density_ratio import Form
from robust_dpo.calibration.report import CalibrationReport, Mixture, build_report
from robust_dpo.calibration.rows import calibrate_rows
from robust_dpo.calibration.samples import CHOSEN, OTHER, TARGET, UNLABELLED, Samples, build_samples
from robust_dpo.checks import Interval, check_flag, check_number
from robust_dpo.errors import argument_error


@dataclass(frozen=True)
class CalibrationResult:
    """What `calibrate_dataset` returns.

    Args:
        dataset: the rows with `probs`, P(target) of each response.
        report: how good they are.
        mixture: proportions and class imbalance; `mixture.options(form)` are the arguments of `density_ratio`.
        h: calibration of each response, for each row, in the form that was asked for.
        group_h: [G] calibration of each row, in the reduction that was asked for.
    """

    dataset: Dataset
    report: CalibrationReport
    mixture: Mixture
    h: list[list[float]]
    group_h: list[float]


def calibrate_dataset(
    dataset: Dataset,
    *,
    target: str = "human",
    golden: Dataset | None = None,
    classifier: str | Path | ClassifierFactory = "tfidf",
    one_vs_source: bool = False,
    include_prompt: bool = False,
    trust_all: bool = False,
    probability: str = "platt",
    folds: int = 5,
    seed: int = 0,
    clip: float = 1e-3,
    form: Form = "paper",
    reduce: str = "mean",
    overwrite: bool = False,
) -> CalibrationResult:
    """Gives every response the probability that it is from the target distribution.

    A classifier learns target responses against the others and scores only prompts that it has not seen
    (cross-fitting), so `probs` are as honest on the training data as on new data.

    Args:
        dataset: canonical rows, with `sources`, or for `target="chosen"` with a boolean column `trusted`.
        target: name of the source that is the target distribution; or "chosen": the best-ranked responses of trusted
            rows are the target and their other responses are not.
        golden: more rows to learn from, cross-fitted like the others but not returned: with `sources`, or known-good
            rankings for `target="chosen"`.
        classifier: "tfidf", the hub name or directory of an encoder, or a function seed → `TextClassifier`.
        one_vs_source: one classifier for each other source instead of a pooled one.
        include_prompt: the classifier reads the prompt too.
        trust_all: for `target="chosen"`, learn from every row as if it were trusted.
        probability: how decision values become probabilities, "platt" or "isotonic".
        folds: of the cross-fitting, by prompt.
        seed: of folds and classifier.
        clip: probabilities are kept in [clip, 1 − clip], 0 < clip < 0.5, so no density ratio is 0 or infinite.
        form, reduce: of the h in the report, see `density_ratio` and `group_calibration`; `probs` depend on neither.
        overwrite: replace `probs` that the dataset already has.

    Raises:
        TypeError, ValueError: an argument is not as described; the dataset has `probs`; it lacks what the labels need,
            or has fewer prompts of a class than folds.
    """
    check_number("clip", clip, Interval(low=0.0, high=0.5, low_open=True, high_open=True))
    for name, flag in (("one_vs_source", one_vs_source), ("include_prompt", include_prompt), ("trust_all", trust_all)):
        check_flag(name, flag)
    samples = build_samples(dataset, target=target, include_prompt=include_prompt, trust_all=trust_all)
    has_probs = "probs" in dataset.column_names and any(probs is not None for probs in dataset["probs"])
    if has_probs and not overwrite:
        raise argument_error("overwrite", "True to replace the probs that the dataset has", overwrite)
    learnt = samples
    if golden is not None:
        extra = build_samples(golden, target=target, include_prompt=include_prompt, trust_all=True)
        learnt = samples.joined(extra)
    if target == CHOSEN and (learnt.labels == UNLABELLED).all():
        raise argument_error(
            "target", "a column 'trusted' with known-good rows, or golden rows, or trust_all for 'chosen'", repr(target)
        )

    raw = cross_fit(
        learnt,
        classifier=classifier,
        one_vs_source=one_vs_source,
        probability=probability,
        folds=folds,
        seed=seed,
    )
    probs = np.clip(raw, clip, 1 - clip)
    mixture = measure_mixture(samples, learnt)
    rows = samples.split(probs[: len(samples.texts)])
    scores = dataset["scores"][:] if "scores" in dataset.column_names else None
    h, group_h = calibrate_rows(rows, scores, form=form, reduce=reduce, **mixture.options(form))
    report = build_report(
        labels=learnt.labels,
        probs=probs,
        counts=learnt.counts,
        kinds=samples.kinds,
        h=np.concatenate(h),
        group_h=group_h,
        mixture=mixture,
        settings={
            "target": target,
            "classifier": str(classifier) if isinstance(classifier, str | Path) else classifier.__class__.__name__,
            "one_vs_source": one_vs_source,
            "include_prompt": include_prompt,
            "trust_all": trust_all,
            "golden_rows": 0 if golden is None else len(golden),
            "probability": probability,
            "folds": folds,
            "seed": seed,
            "clip": clip,
            "form": form,
            "reduce": reduce,
        },
        corrupted=dataset["corrupted"][:] if "corrupted" in dataset.column_names else None,
    )
    bare = dataset.remove_columns("probs") if "probs" in dataset.column_names else dataset
    return CalibrationResult(bare.add_column("probs", rows), report, mixture, h, group_h)


def measure_mixture(samples: Samples, learnt: Samples) -> Mixture:
    """Counts what the data is made of.

    Args:
        samples: the responses to be scored, whose shares α and β are counted; for `target="chosen"` those not ranked
            best are the source "rejected".
        learnt: the same and golden ones, whose class imbalance γ is counted among the labelled.
    """
    kinds, labelled = np.asarray(samples.kinds), np.asarray(learnt.kinds)
    targets = int((learnt.labels == TARGET).sum())
    others = sorted(set(labelled[learnt.labels == OTHER].tolist()))
    betas = {kind: float((kinds == kind).mean()) for kind in others}
    gammas = {kind: int(((labelled == kind) & (learnt.labels == OTHER)).sum()) / targets for kind in others}
    return Mixture(alpha=1 - sum(betas.values()), betas=betas, gammas=gammas)
