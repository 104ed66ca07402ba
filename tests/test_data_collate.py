"""The batch of docs/architecture.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robust_dpo.data import IGNORE_INDEX, PreferenceCollator

PAIR = {"id": "a", "prompt_ids": [5, 6], "response_ids": [[7], [8, 9, 10]], "scores": None, "probs": None}
TRIPLE = {"id": "b", "prompt_ids": [11], "response_ids": [[12, 13], [14], [15]], "scores": [1.0, 3.0, 2.0]}


def test_batch_of_mixed_groups() -> None:
    batch = PreferenceCollator(pad_token_id=99)([PAIR, TRIPLE])
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 99, 99], [5, 6, 8, 9, 10], [11, 12, 13, 99, 99], [11, 14, 99, 99, 99], [11, 15, 99, 99, 99],
    ]  # fmt: skip
    ignored = IGNORE_INDEX
    assert batch["labels"].tolist() == [
        [ignored, ignored, 7, ignored, ignored],
        [ignored, ignored, 8, 9, 10],
        [ignored, 12, 13, ignored, ignored],
        [ignored, 14, ignored, ignored, ignored],
        [ignored, 15, ignored, ignored, ignored],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5, 3, 2, 2]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]
    assert batch["group_sizes"].tolist() == [2, 3]
    assert batch["scores"].tolist() == [0.0, -1.0, 1.0, 3.0, 2.0]
    assert batch["ids"] == ["a", "b"]
    integers = ("input_ids", "attention_mask", "labels", "group_sizes")
    assert all(batch[name].dtype == torch.int64 for name in integers)
    assert set(batch) == {*integers, "scores", "ids"}


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (1, 5), (5, 5), (4, 8), (64, 64)])
def test_width_is_rounded_up(multiple: int | None, width: int) -> None:
    batch = PreferenceCollator(0, pad_to_multiple_of=multiple)([PAIR, TRIPLE])
    narrow = PreferenceCollator(0)([PAIR, TRIPLE])
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
        assert batch[name].shape == (5, width)
        assert torch.equal(batch[name][:, :5], narrow[name])
        assert (batch[name][:, 5:] == fill).all()


def test_optional_columns() -> None:
    rows = [
        {**PAIR, "calibration": 0.5, "ref_logps": [-1.0, -2.0], "domain": "law"},
        {**TRIPLE, "calibration": 2, "ref_logps": [-3.0, -4.0, -5.0], "domain": "tax"},
    ]
    batch = PreferenceCollator()(rows)
    assert batch["calibration"].tolist() == [0.5, 2.0]
    assert batch["ref_logps"].tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert batch["calibration"].dtype == batch["ref_logps"].dtype == batch["scores"].dtype == torch.float32
    assert batch["domains"] == ["law", "tax"]
    assert not {"scores", "domains"} & set(PreferenceCollator()([PAIR]))
    assert batch["input_ids"][0].tolist() == [5, 6, 7, 0, 0]


@pytest.mark.parametrize(("pad", "eos", "expected"), [(3, 2, 3), (0, 2, 0), (None, 2, 2), (None, None, 0)])
def test_pad_token_of_a_tokenizer(pad: int | None, eos: int | None, expected: int) -> None:
    class Tokenizer:
        pad_token_id, eos_token_id = pad, eos

    batch = PreferenceCollator.for_tokenizer(Tokenizer())([PAIR])
    assert batch["input_ids"][0].tolist() == [5, 6, 7, expected, expected]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows: expected at least one tokenised group, got an empty list"),
        ([{"prompt": "x"}], "rows: expected the column 'prompt_ids' of tokenize_groups, got .'prompt'."),
        ([{**PAIR, "prompt_ids": []}], "rows: expected prompts and responses of at least one token"),
        ([{**PAIR, "response_ids": []}], "rows: expected prompts and responses of at least one token"),
        ([{**PAIR, "response_ids": [[1], []]}], "rows: expected prompts and responses of at least one token"),
        ([{**PAIR, "scores": [1.0]}], "rows: expected 2 scores, one per response of row 'a', got 1"),
        ([{**PAIR, "ref_logps": [1.0] * 3}], "rows: expected 2 ref_logps, one per response of row 'a', got 3"),
        ([{**PAIR, "calibration": 1.0}, TRIPLE], "rows: expected 'calibration' in all rows or in none, got 1 of 2"),
        ([{**PAIR, "ref_logps": [1.0, 2.0]}, TRIPLE], "rows: expected 'ref_logps' in all rows or in none, got 1 of 2"),
        ([{**PAIR, "domain": "law"}, TRIPLE], "rows: expected 'domain' in all rows or in none, got 1 of 2"),
    ],
    ids=["none", "not tokenised", "no prompt", "no responses", "empty response", "scores", "ref_logps",
         "some calibrated", "some referenced", "some of a domain"],
)  # fmt: skip
def test_refused_rows(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceCollator()(rows)


def test_calibration_is_one_number_per_group() -> None:
    with pytest.raises(TypeError, match="rows: expected one float as calibration of row 'a', got list"):
        PreferenceCollator()([{**PAIR, "calibration": [1.0, 2.0]}])


def test_domain_is_a_name() -> None:
    with pytest.raises(TypeError, match="rows: expected a string as domain of row 'a', got int"):
        PreferenceCollator()([{**PAIR, "domain": 3}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_token_id": -1}, "pad_token_id: expected a token id .*, got -1"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of: expected at least 1 or None, got 0"),
    ],
    ids=["pad_token_id", "pad_to_multiple_of"],
)
def test_refused_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceCollator(**options)
