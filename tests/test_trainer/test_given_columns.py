"""Columns of rows that stand in place of what is otherwise computed, and options of that computation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from robust_dpo.data import load_preferences, tokenize_groups
from robust_dpo.errors import DataError
from robust_dpo.trainer import RobustDPOConfig
from robust_dpo.trainer.data import RowPreparation


@pytest.fixture
def prepare(tokenizer: Any, tmp_path: Path) -> Callable[..., Dataset]:
    """Rows to tokenised ones; keywords are fields of the configuration."""

    def call(rows: Any, **fields: Any) -> Dataset:
        args = RobustDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **fields)
        return RowPreparation(args, tokenizer)(rows, "train_dataset")

    return call


@pytest.fixture
def tokenised(build_rows: Callable[..., Any], tokenizer: Any) -> list[dict[str, Any]]:
    return [*tokenize_groups(load_preferences(build_rows(6)).dataset, tokenizer)]


@pytest.mark.parametrize("kind", [list, Dataset.from_list, "file"], ids=["dicts", "data set", "file"])
@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"ref_logps": [-1.0, -2.0]}, "ref_logps of"),
        ({"calibration": 0.5}, "calibration of"),
        ({"calibration": 0.5, "ref_logps": [-1.0, -2.0]}, "ref_logps and calibration of"),
    ],
    ids=["ref_logps", "calibration", "both"],
)
def test_rows_of_text_with_columns_for_token_ids_are_warned_about(
    columns: dict[str, Any],
    named: str,
    kind: Any,
    build_rows: Any,
    prepare: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows: Any = [{**row, **columns} for row in build_rows(4)]
    if kind == "file":
        Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
        rows = str(tmp_path / "rows.jsonl")
    else:
        rows = kind(rows)
    with caplog.at_level(logging.WARNING, "robust_dpo"):
        dataset = prepare(rows)
    assert not {*columns} & {*dataset.column_names}
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"train_dataset: {named} rows of text are not used") and "tokenize_groups" in message


def test_nothing_is_said_where_the_columns_are_used_or_absent(
    build_rows: Any, tokenised: Any, prepare: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "robust_dpo"):
        prepare(build_rows(4))
        given = [{**row, "calibration": index / 2} for index, row in enumerate(tokenised)]
        dataset = prepare(given, mode="dora")
    assert dataset["calibration"][:] == [index / 2 for index in range(6)]
    assert not caplog.records


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.25, 1e39, None], ids=str)
@pytest.mark.parametrize("mode", ["reweight", "dora", "dora_outside"])
def test_calibration_that_is_no_density_ratio_is_refused(
    value: float | None, mode: str, tokenised: Any, prepare: Any
) -> None:
    rows = [{**row, "calibration": value if row["id"] == "row-3" else 1.5} for row in tokenised]
    expected = "train_dataset: row 'row-3': expected a calibration that is at least 0 and finite in float32, got "
    with pytest.raises(DataError) as caught:
        prepare(rows, mode=mode)
    assert str(caught.value) == f"{expected}{value}"


def test_calibration_of_text_is_refused(tokenised: Any, prepare: Any) -> None:
    with pytest.raises(DataError, match=r"row 'row-0': expected a calibration .*, got high"):
        prepare([{**row, "calibration": "high"} for row in tokenised], mode="dora")


@pytest.mark.parametrize("mode", ["dora", "dro"])
@pytest.mark.parametrize("name", ["gamma", "per_source", "group_size", "form"])
def test_calibration_options_that_rows_have_no_use_for_are_refused(
    name: str, mode: str, build_rows: Any, prepare: Any
) -> None:
    expected = f"calibration_options: expected some of alpha, betas, gammas, clip, backend, got {name}$"
    with pytest.raises(ValueError, match=expected):
        prepare(build_rows(4, probs=lambda rng: rng.random()), mode=mode, calibration_options={name: 1, "clip": 2.0})
