"""The default classifier: TF-IDF of words and characters, then logistic regression. Needs no download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, Pipeline


class TfidfClassifier:
    """Words (1–2) and characters (3–5 within words) as TF-IDF features of a logistic regression.

    Args:
        seed: of the solver.
        c: inverse regularisation of the logistic regression.
        max_features: size of each of the two vocabularies, the most frequent n-grams of the training texts.
    """

    inner_folds = 3

    def __init__(self, seed: int, *, c: float = 3.0, max_features: int = 50_000) -> None:
        words = TfidfVectorizer(
            ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", sublinear_tf=True, max_features=max_features
        )
        characters = TfidfVectorizer(
            analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, max_features=max_features
        )
        self._model = Pipeline(
            [
                ("features", FeatureUnion([("words", words), ("characters", characters)])),
                ("classifier", LogisticRegression(C=c, solver="liblinear", random_state=seed)),
            ]
        )

    def fit(self, texts: Sequence[str], labels: NDArray[np.int64]) -> None:
        """Learns P(label = 1 | text) from texts [S] and labels [S] (0 or 1)."""
        self._model.fit(texts, labels)

    def decide(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[S] log-odds of label 1, not yet calibrated."""
        decisions: NDArray[np.float64] = self._model.decision_function(texts)
        return decisions
