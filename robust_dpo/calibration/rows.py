"""Calibration of whole rows: from the `probs` of ragged groups to h of their responses and of the groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from robust_dpo.calibration.density_ratio import Form, density_ratio
from robust_dpo.calibration.reduce import group_calibration
from robust_dpo.errors import argument_error


def ranking(num_responses: int, scores: Sequence[float] | None) -> list[int]:
    """Positions of a row's responses, best first: by score (ties by position), or by position where there are none."""
    if scores is None:
        return list(range(num_responses))
    return sorted(range(num_responses), key=lambda index: -scores[index])


def calibrate_rows(
    probs: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float] | None] | None = None,
    *,
    form: Form = "paper",
    reduce: str = "mean",
    **options: Any,
) -> tuple[list[list[float]], list[float]]:
    """Calibration of rows of any number of responses.

    Args:
        probs: for each of G rows, P(target) of its responses.
        scores: for each row what its responses are ranked by, or None: best first.
        form: see `density_ratio`.
        reduce: see `group_calibration`.
        options: further arguments of `density_ratio`.

    Returns:
        h of the responses of each row, in the order of `probs`, and h of each row.

    Raises:
        TypeError, ValueError: as the two functions; or `scores` has another number of rows.
    """
    ranks = scores if scores is not None else [None] * len(probs)
    if len(ranks) != len(probs):
        raise argument_error("scores", f"{len(probs)} rows, as probs", len(ranks))
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(probs):
        by_size[len(row)].append(index)
    responses: list[list[float]] = [[] for _ in probs]
    groups = [0.0] * len(probs)
    for size, members in by_size.items():
        h = density_ratio(torch.tensor([probs[index] for index in members], dtype=torch.float64), form, **options)
        order = torch.tensor([ranking(size, ranks[index]) for index in members])
        reduced = group_calibration(h.gather(1, order), reduce)
        for index, row_h, group_h in zip(members, h.tolist(), reduced.tolist(), strict=True):
            responses[index], groups[index] = row_h, group_h
    return responses, groups
