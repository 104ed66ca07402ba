"""Train and held-out rows, apart by prompt."""

from __future__ import annotations

import hashlib
import json

import datasets

from robust_dpo.data.rows import Prompt
from robust_dpo.errors import argument_error, type_error


def split_by_prompt(
    dataset: datasets.Dataset, fraction: float, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split rows so that a prompt is never on both sides.

    The side of a row depends on its prompt and the seed alone: not on the order of the rows, on the other rows or on
    the machine. So rows added later do not move the old ones. The held-out share is `fraction` on average.

    Args:
        dataset: canonical rows.
        fraction: share of the prompts to hold out, in (0, 1).
        seed: another seed gives another split.

    Returns:
        (train, held out), each in the order of `dataset`.

    Raises:
        TypeError, ValueError: an argument that cannot be used, or a side would have no row.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise type_error("dataset", "a datasets.Dataset of canonical rows", dataset)
    if "prompt" not in dataset.column_names:
        raise argument_error("dataset", "a column 'prompt'", dataset.column_names)
    if not 0.0 < fraction < 1.0:
        raise argument_error("fraction", "a number between 0 and 1", fraction)
    sides: tuple[list[int], list[int]] = ([], [])
    for index, prompt in enumerate(dataset["prompt"]):
        sides[_uniform(prompt, seed) < fraction].append(index)
    if not all(sides):
        counts = f"{len(sides[0])} train and {len(sides[1])} held-out rows"
        raise argument_error("fraction", "a share that leaves rows on both sides", f"{fraction}: {counts}")
    train, held_out = (dataset.select(indices) for indices in sides)
    return train, held_out


def _uniform(prompt: Prompt, seed: int) -> float:
    """A number in [0, 1) that the prompt and the seed determine on every machine."""
    text = json.dumps([seed, prompt], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
