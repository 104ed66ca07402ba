"""From canonical rows to what a classifier learns: one text per response, its label, and the prompt it belongs to."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from robust_dpo.calibration.rows import ranking
from robust_dpo.errors import argument_error, type_error

CHOSEN = "chosen"
TARGET, OTHER, UNLABELLED = 1, 0, -1


@dataclass(frozen=True)
class Samples:
    """All responses of a dataset, flat and prompt-major.

    Args:
        texts: [S] what the classifier reads.
        labels: [S] int64, `TARGET`, `OTHER`, or `UNLABELLED` for a response that is scored but not learnt from.
        prompts: [S] a key of the prompt; equal prompts have equal keys.
        kinds: [S] name of what the response is: its source, or "chosen"/"rejected".
        group_sizes: [G] int64, responses of each row.
    """

    texts: list[str]
    labels: NDArray[np.int64]
    prompts: list[str]
    kinds: list[str]
    group_sizes: NDArray[np.int64]

    @property
    def counts(self) -> dict[str, int]:
        """How many labelled responses there are of each kind, by name."""
        labelled = Counter(kind for kind, label in zip(self.kinds, self.labels, strict=True) if label != UNLABELLED)
        return dict(sorted(labelled.items()))

    def joined(self, more: Samples) -> Samples:
        """These samples, then those of `more`."""
        return Samples(
            self.texts + more.texts,
            np.concatenate([self.labels, more.labels]),
            self.prompts + more.prompts,
            self.kinds + more.kinds,
            np.concatenate([self.group_sizes, more.group_sizes]),
        )

    def split(self, values: NDArray[np.float64]) -> list[list[float]]:
        """Flat [S] values as one list per row."""
        return [part.tolist() for part in np.split(values, np.cumsum(self.group_sizes)[:-1])]


def build_samples(dataset: Dataset, *, target: str, include_prompt: bool = False, trust_all: bool = False) -> Samples:
    """Flattens `dataset` and labels its responses.

    With `target="chosen"` the best-ranked response of a trusted row (boolean column `trusted`) is the target, its other
    responses are the others, and rows that are not trusted stay unlabelled; otherwise responses whose `sources` entry
    is `target` are the target and all others are the others.

    Args:
        dataset: canonical rows; ranked by `scores` where given, otherwise by position.
        target: name of the target source, or "chosen".
        include_prompt: the classifier reads the prompt before the response, instead of the response alone.
        trust_all: with `target="chosen"`, treat every row as trusted.

    Raises:
        TypeError, ValueError: the dataset lacks what the labels need.
    """
    if not isinstance(dataset, Dataset):
        raise type_error("dataset", "a datasets.Dataset", dataset)
    missing = sorted({"prompt", "responses"} - set(dataset.column_names))
    if missing or not len(dataset):
        raise argument_error("dataset", "at least one row with the columns prompt and responses", f"none of {missing}")
    rows = dataset.to_list()
    label = _label_by_rank(rows, trust_all) if target == CHOSEN else _label_by_source(rows, target)
    texts, labels, prompts, kinds, sizes = [], [], [], [], []
    for row, row_labels in zip(rows, label, strict=True):
        key, prefix = json.dumps(row["prompt"]), f"{_prompt_text(row['prompt'])}\n\n" if include_prompt else ""
        texts += [prefix + response for response in row["responses"]]
        prompts += [key] * len(row["responses"])
        labels += [value for value, _ in row_labels]
        kinds += [kind for _, kind in row_labels]
        sizes.append(len(row["responses"]))
    return Samples(texts, np.asarray(labels, dtype=np.int64), prompts, kinds, np.asarray(sizes, dtype=np.int64))


def _label_by_source(rows: list[dict[str, Any]], target: str) -> list[list[tuple[int, str]]]:
    labelled = []
    for row in rows:
        sources = row.get("sources")
        if sources is None or len(sources) != len(row["responses"]):
            raise argument_error(
                "dataset",
                f"a source for every response of row {row.get('id')!r} (or target='chosen' for data without sources)",
                sources,
            )
        labelled.append([(TARGET if source == target else OTHER, source) for source in sources])
    known = {kind for row in labelled for _, kind in row}
    if target not in known:
        raise argument_error("target", f"one of the sources {', '.join(sorted(known))}", repr(target))
    if known == {target}:
        raise argument_error("dataset", f"responses of other sources than {target!r} too", "only one class")
    return labelled


def _label_by_rank(rows: list[dict[str, Any]], trust_all: bool) -> list[list[tuple[int, str]]]:
    labelled = []
    for row in rows:
        best = ranking(len(row["responses"]), row.get("scores"))[0]
        trusted = trust_all or bool(row.get("trusted"))
        labelled.append(
            [
                (
                    (TARGET if index == best else OTHER) if trusted else UNLABELLED,
                    CHOSEN if index == best else "rejected",
                )
                for index in range(len(row["responses"]))
            ]
        )
    return labelled


def _prompt_text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
