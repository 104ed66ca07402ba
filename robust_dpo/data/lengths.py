"""Lengths of tokenised groups, read from their Arrow columns without decoding a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Integers = npt.NDArray[np.int64]

_ROWS_AT_ONCE = 4096
_COLUMNS = ("prompt_ids", "response_ids")


@dataclass(frozen=True)
class TokenLengths:
    """Lengths of G groups with S responses, in tokens.

    Args:
        prompts: [G] of the prompts.
        sizes: [G] responses of each group.
        responses: [S] of the responses, those of a group adjacent.
    """

    prompts: Integers
    sizes: Integers
    responses: Integers

    @staticmethod
    def of(tokenised: datasets.Dataset) -> TokenLengths:
        """The lengths of rows with prompt_ids and response_ids."""
        parts = [
            (_lengths(prompts), _lengths(groups), _lengths(pc.list_flatten(groups)))
            for prompts, groups in _arrays(tokenised)
        ]
        return TokenLengths(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    @property
    def sequences(self) -> Integers:
        """[S] prompt and response together."""
        return np.repeat(self.prompts, self.sizes) + self.responses

    @property
    def longest(self) -> Integers:
        """[G] the longest sequence of each group."""
        longest: Integers = np.maximum.reduceat(self.sequences, np.cumsum(self.sizes) - self.sizes)
        return longest


def token_columns(tokenised: datasets.Dataset) -> Iterator[tuple[Integers, ...]]:
    """Some thousand rows at a time: lengths of prompts, sizes, lengths of responses, then the ids of both."""
    for prompts, groups in _arrays(tokenised):
        responses = pc.list_flatten(groups)
        ids = (_integers(pc.list_flatten(lists)) for lists in (prompts, responses))
        yield _lengths(prompts), _lengths(groups), _lengths(responses), *ids


def _arrays(tokenised: datasets.Dataset) -> Iterator[tuple[pa.Array, pa.Array]]:
    for table in tokenised.select_columns([*_COLUMNS]).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        prompts, groups = (table[name].combine_chunks() for name in _COLUMNS)
        yield prompts, groups


def _lengths(lists: pa.Array) -> Integers:
    return _integers(pc.list_value_length(lists))


def _integers(values: pa.Array) -> Integers:
    return np.ascontiguousarray(values.to_numpy(zero_copy_only=False), dtype=np.int64)
