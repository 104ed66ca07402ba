"""The default classifier: TF-IDF of words and characters, then logistic regression. Needs no download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack, vstack
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline


class HashedNgrams:
    """Counts of hashed n-grams: words and punctuation (1–2), and characters within words (3–5).

    Hashing learns nothing from the texts, so counts may be shared by all folds; they are kept, because a cross-fitted
    calibration asks for the same text 20 times and counting is nine tenths of its time.

    Args:
        num_features: size of each of the two hashed vocabularies.
    """

    def __init__(self, num_features: int = 2**18) -> None:
        common = {"n_features": num_features, "alternate_sign": False, "norm": None, "dtype": np.float32}
        self._vectorizers = (
            HashingVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", **common),
            HashingVectorizer(ngram_range=(3, 5), analyzer="char_wb", **common),
        )
        self._width = num_features * len(self._vectorizers)
        self._row_of: dict[str, int] = {}
        self._counts = csr_matrix((0, self._width), dtype=np.float32)

    def counts(self, texts: Sequence[str]) -> csr_matrix:
        """[S, num_features · 2] sparse fp32 counts."""
        new = [text for text in dict.fromkeys(texts) if text not in self._row_of]
        if new:
            added = hstack([vectorizer.transform(new) for vectorizer in self._vectorizers], format="csr")
            self._row_of |= {text: len(self._row_of) + index for index, text in enumerate(new)}
            self._counts = vstack([self._counts, added], format="csr")
        return self._counts[[self._row_of[text] for text in texts]]


class TfidfClassifier:
    """Logistic regression on TF-IDF; frequencies of documents are learnt from the training texts alone.

    Args:
        seed: of the solver.
        ngrams: the counts, which several classifiers may share.
        c: inverse regularisation of the logistic regression.
    """

    inner_folds = 3

    def __init__(self, seed: int, ngrams: HashedNgrams | None = None, *, c: float = 3.0) -> None:
        self._ngrams = ngrams or HashedNgrams()
        self._columns = np.empty(0, dtype=np.int64)
        self._model = make_pipeline(
            TfidfTransformer(sublinear_tf=True), LogisticRegression(C=c, solver="liblinear", random_state=seed)
        )

    def fit(self, texts: Sequence[str], labels: NDArray[np.int64]) -> None:
        """Learns P(label = 1 | text) from texts [S] and labels [S] (0 or 1)."""
        counts = self._ngrams.counts(texts)
        # n-grams of a single training text teach nothing about others; without their columns the solver's weights fit
        # in cache, which makes it 10 times as fast
        texts_with = np.bincount(counts.indices, minlength=counts.shape[1])
        self._columns = np.flatnonzero(texts_with > min(1, texts_with.max() - 1))
        self._model.fit(counts[:, self._columns], labels)

    def decide(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[S] log-odds of label 1, not yet calibrated."""
        decisions: NDArray[np.float64] = self._model.decision_function(self._ngrams.counts(texts)[:, self._columns])
        return decisions
