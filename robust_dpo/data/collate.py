"""Tokenised groups to the padded batch that the trainer feeds to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robust_dpo.errors import argument_error, type_error
from robust_dpo.layout import Group, LayoutPlan, pack_groups

IGNORE_INDEX = -100
"""Label of positions that are not part of a response."""


@dataclass(frozen=True)
class PreferenceCollator:
    """Pads tokenised groups of possibly different K on the right.

    Args:
        pad_token_id: what `input_ids` hold where nothing is; masked everywhere, so any id will do. None is 0; see
            `PreferenceCollator.for_tokenizer`.
        pad_to_multiple_of: round the width T up to a multiple of this (tensor cores like 8 or 64).
        shared: also lay out the groups without padding, with one prompt for all responses of a group (True) or one
            for each (False); None does not.
        row_tokens: places of the rows in that layout; None is one row.
        row_multiple: of which a row of that layout has so many places.

    Called with a list of G rows of `tokenize_groups`, it returns a dict with S = Σ K responses, prompt-major:
        input_ids, attention_mask, labels: [S, T] int64; labels are unshifted, −100 on prompt and padding.
        group_sizes: [G] int64, the K of each group.
        ids: list of G str, if the rows have an `id`.
        domains: list of G str, if the rows have a column `domain`.
        scores: [S] float32, if any row has scores; rows without get 0, −1, −2, … (best first).
        calibration: [G] float32, if the rows have a column `calibration` (one float).
        ref_logps: [S] float32, if the rows have a column `ref_logps` (K floats).
        packed: `PackedGroups`, if `shared` is not None.

    Raises:
        TypeError, ValueError: rows that are not tokenised groups, or where only some have a calibration, ref_logps or
            domain.
    """

    pad_token_id: int | None = None
    pad_to_multiple_of: int | None = None
    shared: bool | None = None
    row_tokens: int | None = None
    row_multiple: int = 1

    def __post_init__(self) -> None:
        if self.pad_token_id is not None and self.pad_token_id < 0:
            raise argument_error("pad_token_id", "a token id (0 or more) or None", self.pad_token_id)
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise argument_error("pad_to_multiple_of", "at least 1 or None", self.pad_to_multiple_of)

    @staticmethod
    def for_tokenizer(tokenizer: Any, pad_to_multiple_of: int | None = None) -> PreferenceCollator:
        """The collator with the tokenizer's pad token, or its EOS if it has none."""
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return PreferenceCollator(pad, pad_to_multiple_of)

    def for_layout(self, plan: LayoutPlan) -> PreferenceCollator:
        """This collator for models whose batches are laid out as planned."""
        shared = None if plan.kind == "padded" else plan.kind == "group"
        return replace(self, shared=shared, row_tokens=plan.row_tokens, row_multiple=plan.row_multiple)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not rows:
            raise argument_error("rows", "at least one tokenised group", "an empty list")
        for row in rows:
            _check_row(row)
        batch: dict[str, Any] = self._pad(rows)
        batch["group_sizes"] = torch.tensor([len(row["response_ids"]) for row in rows])
        if self.shared is not None:
            groups = [Group(row["prompt_ids"], row["response_ids"]) for row in rows]
            batch["packed"] = pack_groups(
                groups, shared=self.shared, row_tokens=self.row_tokens, row_multiple=self.row_multiple
            )
        if any(row.get("scores") is not None for row in rows):
            batch["scores"] = torch.tensor([score for row in rows for score in _scores(row)], dtype=torch.float32)
        if _all_or_none(rows, "calibration"):
            batch["calibration"] = torch.tensor([float(row["calibration"]) for row in rows], dtype=torch.float32)
        if _all_or_none(rows, "ref_logps"):
            batch["ref_logps"] = torch.tensor([x for row in rows for x in row["ref_logps"]], dtype=torch.float32)
        if _all_or_none(rows, "id"):
            batch["ids"] = [str(row["id"]) for row in rows]
        if _all_or_none(rows, "domain"):
            batch["domains"] = [row["domain"] for row in rows]
        return batch

    def _pad(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        pairs = [(row["prompt_ids"], response) for row in rows for response in row["response_ids"]]
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(len(prompt) + len(response) for prompt, response in pairs) // multiple) * multiple
        input_ids = torch.full((len(pairs), width), self.pad_token_id or 0)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for index, (prompt, response) in enumerate(pairs):
            start, stop = len(prompt), len(prompt) + len(response)
            input_ids[index, :stop] = torch.tensor([*prompt, *response])
            attention_mask[index, :stop] = 1
            labels[index, start:stop] = torch.tensor(response)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _check_row(row: Mapping[str, Any]) -> None:
    for field in ("prompt_ids", "response_ids"):
        if field not in row:
            raise argument_error("rows", f"the column {field!r} of tokenize_groups", sorted(row))
    if not row["prompt_ids"] or not row["response_ids"] or not all(row["response_ids"]):
        raise argument_error("rows", "prompts and responses of at least one token", f"row {row.get('id')!r}")
    for field in ("scores", "ref_logps"):
        if row.get(field) is not None and len(row[field]) != len(row["response_ids"]):
            expected = f"{len(row['response_ids'])} {field}, one per response of row {row.get('id')!r}"
            raise argument_error("rows", expected, len(row[field]))
    if row.get("calibration") is not None and not isinstance(row["calibration"], (int, float)):
        raise type_error("rows", f"one float as calibration of row {row.get('id')!r}", row["calibration"])
    if row.get("domain") is not None and not isinstance(row["domain"], str):
        raise type_error("rows", f"a string as domain of row {row.get('id')!r}", row["domain"])


def _scores(row: Mapping[str, Any]) -> list[float]:
    """The scores, or the order of the responses as scores: what `Groups.quality` ranks by without scores."""
    if row.get("scores") is not None:
        return list(row["scores"])
    return [-float(position) for position in range(len(row["response_ids"]))]


def _all_or_none(rows: Sequence[Mapping[str, Any]], field: str) -> bool:
    """Whether the rows have the field; half of a batch with it is an error, not a guess."""
    present = sum(row.get(field) is not None for row in rows)
    if 0 < present < len(rows):
        raise argument_error("rows", f"{field!r} in all rows or in none", f"{present} of {len(rows)}")
    return present > 0
