"""The pairs of one repetition: a training part with reversed labels, and a clean held-out part."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from robust_dpo.data import load_preferences, split_by_prompt
from robust_dpo.demo.settings import DemoSettings
from robust_dpo.errors import DataError
from robust_dpo.world import corrupt_labels, make_world

TARGET = "human"
_HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Corpus:
    """Data of one repetition.

    Args:
        train: canonical rows with a column `corrupted`; where sources are unknown also with `trusted`.
        held_out: clean rows of other prompts.
        target: what the classifier learns: a source, or "chosen" of the trusted rows.
        reduce: how the ratios of a pair become one (`group_calibration`).
        description: what this is, for the reader.
    """

    train: Dataset
    held_out: Dataset
    target: str
    reduce: str
    description: str

    @property
    def corrupted(self) -> Dataset:
        """The corrupted training pairs with their true labels (reversing the order again restores it)."""
        rows = self.train.filter(lambda corrupted: corrupted, input_columns="corrupted", load_from_cache_file=False)
        return rows.map(_reverse, load_from_cache_file=False)


def _reverse(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: row[name][::-1] for name in ("responses", "sources", "probs") if name in row and row[name] is not None
    }


def load_corpus(settings: DemoSettings, seed: int) -> Corpus:
    """The generated world, or real data with or without sources.

    Raises:
        DataError: the data cannot be used, or is too little.
    """
    if settings.data is None:
        return _world(settings, seed)
    loaded = load_preferences(settings.data, on_bad_row="drop")
    train, held_out = split_by_prompt(loaded.dataset, _HELD_OUT_SHARE, seed)
    train = _shuffled(train, seed, settings.budget.train_pairs)
    held_out = _shuffled(held_out, seed, settings.budget.held_out_pairs)
    if len(train) < 50 or len(held_out) < 10:
        raise DataError(f"{len(train)} training and {len(held_out)} held-out groups are too few", path=settings.data)
    origin = f"{loaded.report.rows_kept} of {loaded.report.rows_read} rows usable"
    sources = {source for row in train["sources"] for source in row or ()}
    if TARGET in sources and len(sources) > 1:
        return _with_sources(train, held_out, settings, seed, origin)
    return _without_sources(train, held_out, settings, seed, origin)


def _shuffled(rows: Dataset, seed: int, most: int) -> Dataset:
    order = list(range(len(rows)))
    random.Random(f"robust_dpo.demo/{seed}").shuffle(order)
    return rows.select(order[:most])


def _world(settings: DemoSettings, seed: int) -> Corpus:
    train = make_world(settings.budget.train_pairs, seed, split="train")
    held_out = make_world(settings.budget.held_out_pairs, seed, split="eval")
    return _with_sources(train, held_out, settings, seed, "generated world")


def _with_sources(train: Dataset, held_out: Dataset, settings: DemoSettings, seed: int, origin: str) -> Corpus:
    """Synthetic labels are the unreliable ones: only pairs with a response that is not human are reversed."""
    train = corrupt_labels(train, settings.corruption, seed, where="non_target", target=TARGET)
    description = (
        f"{origin}; the labels of {sum(train['corrupted'])} of {len(train)} training pairs are reversed, all of them "
        f"synthetic; the classifier learns {TARGET} against synthetic responses, from their sources alone"
    )
    return Corpus(train, held_out, TARGET, "mean", description)


def _without_sources(train: Dataset, held_out: Dataset, settings: DemoSettings, seed: int, origin: str) -> Corpus:
    """No source tells right from wrong, so a trusted subset of the training pairs, never corrupted, has to."""
    number = round(settings.trusted * len(train))
    # rows are shuffled already, so the first ones are a random subset
    train = train.add_column("trusted", [index < number for index in range(len(train))])
    train = corrupt_labels(train, settings.corruption, seed)
    description = (
        f"{origin}; the labels of {sum(train['corrupted'])} of {len(train)} training pairs are reversed, "
        f"of the other pairs {number} are known to be right (trusted): all arms train on them, the classifier learns "
        "their preferred responses against their rejected ones, and the calibrated arms give them the h of a certain "
        "label"
    )
    return Corpus(train, held_out, "chosen", "share", description)
