"""Spoils preference labels in a controlled way, so that robustness can be measured."""

from __future__ import annotations

import random
from typing import Any, Literal

from datasets import Dataset

from robust_dpo.errors import argument_error, type_error

Where = Literal["any", "non_target"]


def corrupt_labels(
    dataset: Dataset, fraction: float, seed: int, *, where: Where = "any", target: str = "human"
) -> Dataset:
    """Reverses the ranking of a share of the groups.

    A corrupted row claims the opposite of what it claimed: its responses change places (with their `sources` and
    `probs`), while the scores stay best first, so that neither order nor scores tell it from a clean row. Clean rows
    are put best first too. The boolean column `corrupted` is for evaluation only.

    Args:
        dataset: canonical rows; ranked by `scores` where given, otherwise by position.
        fraction: share of **all** rows to corrupt, in [0, 1]; round(fraction · rows) rows are hit, exactly.
        seed: the same seed hits the same rows in every process.
        where: "any" hits rows at random; "non_target" hits only rows with a response that is not from `target`.
            Rows marked in a boolean column `trusted` are never hit.
        target: the name of the target source, for "non_target".

    Returns:
        A new dataset with the column `corrupted`; the row order is kept.

    Raises:
        ValueError: an argument is not as described, or fewer rows can be hit than `fraction` asks for.
    """
    if not isinstance(dataset, Dataset):
        raise type_error("dataset", "a datasets.Dataset", dataset)
    if not 0 <= fraction <= 1:
        raise argument_error("fraction", "a number in [0, 1]", fraction)
    if where not in ("any", "non_target"):
        raise argument_error("where", "'any' or 'non_target'", repr(where))
    columns = dataset.column_names
    if "corrupted" in columns:
        raise argument_error("dataset", "rows that were not corrupted before", "a column 'corrupted'")
    if where == "non_target" and "sources" not in columns:
        raise argument_error("where", "'any' for a dataset without the column 'sources'", repr(where))

    eligible = list(range(len(dataset)))
    if "trusted" in columns:
        trusted = dataset["trusted"]
        eligible = [index for index in eligible if not trusted[index]]
    if where == "non_target":
        sources = dataset["sources"]
        eligible = [index for index in eligible if any(source != target for source in sources[index] or [])]
    wanted = round(fraction * len(dataset))
    if wanted > len(eligible):
        raise argument_error(
            "fraction", f"at most {len(eligible)} of {len(dataset)} rows, those that can be hit", fraction
        )
    hit = set(random.Random(f"robust_dpo.corruption/{seed}").sample(eligible, wanted))

    rows = [row | _ranked(row, reverse=index in hit) for index, row in enumerate(dataset.to_list())]
    relabelled = Dataset.from_list(rows, features=dataset.features)
    return relabelled.add_column("corrupted", [index in hit for index in range(len(rows))])


def _ranked(row: dict[str, Any], *, reverse: bool) -> dict[str, Any]:
    """The per-response columns of a row, best first, or worst first under the scores of best first."""
    scores = row.get("scores")
    positions = range(len(row["responses"]))
    order = list(positions) if scores is None else sorted(positions, key=lambda index: -scores[index])
    ranked: dict[str, Any] = {} if scores is None else {"scores": [scores[index] for index in order]}
    if reverse:
        order.reverse()
    for column in ("responses", "sources", "probs"):
        if row.get(column) is not None:
            ranked[column] = [row[column][index] for index in order]
    return ranked
