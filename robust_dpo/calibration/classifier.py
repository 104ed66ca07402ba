"""P(target | response) for every response, each from a classifier that never saw its prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from robust_dpo.calibration.probability import CALIBRATORS, Calibrator
from robust_dpo.calibration.samples import OTHER, TARGET, UNLABELLED, Samples
from robust_dpo.errors import argument_error, type_error

_log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


class TextClassifier(Protocol):
    """A binary classifier of texts; one object is fitted once."""

    inner_folds: int
    """Folds for the probability calibration: at 2 or more the classifier is fitted once per fold and once on
    everything; at 1 it is fitted once, on four fifths, and calibrated on the rest."""

    def fit(self, texts: Sequence[str], labels: Labels) -> None:
        """Learns from texts [S] and labels [S] (0 or 1)."""

    def decide(self, texts: Sequence[str]) -> Floats:
        """[S] values that grow with the odds of label 1."""


ClassifierFactory = Callable[[int], TextClassifier]
"""Makes a new classifier from a seed."""

Scorer = Callable[[Sequence[str]], Floats]
"""Texts [S] → P(target) [S]."""


def resolve_classifier(classifier: str | Path | ClassifierFactory) -> ClassifierFactory:
    """The factory behind a name: "tfidf", a hub name or directory of an encoder, or a factory itself."""
    if callable(classifier):
        return classifier
    if not isinstance(classifier, (str, Path)):
        raise type_error("classifier", "'tfidf', the name or directory of an encoder, or a factory", classifier)
    if classifier == "tfidf":
        from robust_dpo.calibration.tfidf import HashedNgrams, TfidfClassifier

        ngrams = HashedNgrams()
        return lambda seed: TfidfClassifier(seed, ngrams)
    from robust_dpo.calibration.encoder import EncoderClassifier  # imports transformers' trainer

    return lambda seed: EncoderClassifier(classifier, seed)


def fit_classifier(
    texts: Sequence[str],
    labels: Labels,
    prompts: Sequence[str],
    *,
    classifier: str | Path | ClassifierFactory = "tfidf",
    probability: str = "platt",
    seed: int = 0,
) -> Scorer:
    """Fits one classifier and the calibration of its probabilities, both on these samples only.

    The map from decision values to probabilities is fitted to decisions about held-out prompts (inner folds), so it is
    not fooled by how well the classifier remembers its training texts.

    Args:
        texts: [S].
        labels: [S] int64, 1 for the target and 0 for the others.
        prompts: [S], key of each sample's prompt; samples of one prompt stay in one fold.
        classifier: "tfidf", the hub name or directory of an encoder, or a function seed → `TextClassifier`.
        probability: "platt" (a logistic curve) or "isotonic" (a step function).
        seed: of folds and classifier.

    Returns:
        A function from texts to P(target), at the class proportions of these samples.

    Raises:
        TypeError, ValueError: an argument is not as described, or there are too few prompts of a class.
    """
    if probability not in CALIBRATORS:
        raise argument_error("probability", f"one of {', '.join(CALIBRATORS)}", repr(probability))
    make = resolve_classifier(classifier)
    model = make(seed)
    held_out = model.inner_folds == 1
    # one fold of five is the held-out part where the classifier is fitted only once
    wanted = 5 if held_out else model.inner_folds
    folds = min(wanted, _prompts_per_class(labels, prompts))
    if folds < 2:
        raise argument_error("dataset", "at least 2 prompts of each class to calibrate probabilities with", folds)
    fold_of = assign_folds(labels, prompts, folds, seed)
    texts = list(texts)
    if held_out:
        test = fold_of == 0
        model.fit(_pick(texts, ~test), labels[~test])
        calibrate: Calibrator = CALIBRATORS[probability](model.decide(_pick(texts, test)), labels[test])
    else:
        decisions = np.empty(len(texts))
        for fold in range(folds):
            test = fold_of == fold
            inner = make(seed)
            inner.fit(_pick(texts, ~test), labels[~test])
            decisions[test] = inner.decide(_pick(texts, test))
        calibrate = CALIBRATORS[probability](decisions, labels)
        model.fit(texts, labels)
    return lambda new_texts: calibrate(model.decide(list(new_texts)))


def cross_fit(
    samples: Samples,
    *,
    classifier: str | Path | ClassifierFactory = "tfidf",
    one_vs_source: bool = False,
    probability: str = "platt",
    folds: int = 5,
    seed: int = 0,
) -> Floats:
    """Scores every sample by a classifier fitted to the other folds; all responses to a prompt are in one fold.

    Args:
        samples: what to score, and to learn from where labelled.
        one_vs_source: one classifier for each other source, combined to P(target) under all of them,
            1 / (1 + Σ_i (1 − c_i)/c_i), instead of one that pools the other sources.
        classifier, probability, seed: see `fit_classifier`.
        folds: at least 2, at most the number of prompts with a target response and with another.

    Returns:
        [S] float64, P(target), not clipped.

    Raises:
        TypeError, ValueError: an argument is not as described, or a class has too few prompts.
    """
    if isinstance(folds, bool) or not isinstance(folds, int):
        raise type_error("folds", "an integer", folds)
    if folds < 2:
        raise argument_error("folds", "at least 2", folds)
    _check_classes(samples, folds)
    make = resolve_classifier(classifier)
    fold_of = assign_folds(samples.labels, samples.prompts, folds, seed)
    probs = np.full(len(samples.texts), np.nan)
    for fold in range(folds):
        scored = fold_of == fold
        train = _training_part(samples, ~scored)
        texts = _pick(samples.texts, scored)
        odds_against = np.zeros(len(texts))
        for part in _against_each_source(train) if one_vs_source else [train]:
            scorer = fit_classifier(
                [text for text, _, _, _ in part],
                np.asarray([label for _, label, _, _ in part], dtype=np.int64),
                [prompt for _, _, prompt, _ in part],
                classifier=make,
                probability=probability,
                seed=seed,
            )
            c = scorer(texts)
            odds_against += (1 - c) / np.maximum(c, np.finfo(np.float64).tiny)
        probs[scored] = 1 / (1 + odds_against)
        _log.info(
            "calibration fold %d of %d: learnt from %d responses, scored %d", fold + 1, folds, len(train), len(texts)
        )
    return probs


def assign_folds(labels: Labels, prompts: Sequence[str], folds: int, seed: int) -> NDArray[np.int64]:
    """[S] the fold of each sample: whole prompts, shuffled by `seed`, labels spread evenly."""
    _, groups = np.unique(np.asarray(prompts), return_inverse=True)
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    fold_of = np.empty(len(labels), dtype=np.int64)
    for fold, (_, test) in enumerate(splitter.split(np.zeros(len(labels)), labels, groups)):
        fold_of[test] = fold
    return fold_of


_Sample = tuple[str, int, str, str]  # text, label, prompt, kind


def _training_part(samples: Samples, chosen: NDArray[np.bool_]) -> list[_Sample]:
    rows = zip(samples.texts, samples.labels.tolist(), samples.prompts, samples.kinds, strict=True)
    return [row for row, use in zip(rows, chosen, strict=True) if use and row[1] != UNLABELLED]


def _against_each_source(train: list[_Sample]) -> list[list[_Sample]]:
    sources = sorted({kind for _, label, _, kind in train if label == OTHER})
    return [[row for row in train if row[1] == TARGET or row[3] == source] for source in sources]


def _pick(texts: Sequence[str], chosen: NDArray[np.bool_]) -> list[str]:
    return [text for text, use in zip(texts, chosen, strict=True) if use]


def _prompts_per_class(labels: Labels, prompts: Sequence[str]) -> int:
    """Number of different prompts of the class that has the fewest."""
    keys = np.asarray(prompts)
    return min(len(np.unique(keys[labels == label])) for label in (TARGET, OTHER))


def _check_classes(samples: Samples, folds: int) -> None:
    for label, name in ((TARGET, "target"), (OTHER, "other")):
        if not (samples.labels == label).any():
            raise argument_error(
                "dataset", "responses of both classes, target and other, to learn from", f"no {name} ones"
            )
    number = _prompts_per_class(samples.labels, samples.prompts)
    if number < folds:
        raise argument_error("folds", f"at most {number}, the number of prompts with responses of a class", folds)
