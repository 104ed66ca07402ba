"""Domains of rows on their way to the trainer's batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from robust_dpo.data import load_preferences, tokenize_groups
from robust_dpo.errors import DataError
from robust_dpo.robust import GroupDRO
from robust_dpo.trainer import RobustDPOConfig
from robust_dpo.trainer.data import RowPreparation

TOPICS = ["law", "tax", "law", "art"]


@pytest.fixture
def rows(build_rows: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Four rows with a topic."""
    return [{**row, "topic": topic} for row, topic in zip(build_rows(4), TOPICS, strict=True)]


@pytest.fixture
def prepare(tokenizer: Any, tmp_path: Any) -> Callable[..., Dataset]:
    """Rows to tokenised ones; keywords are fields of the configuration."""

    def call(rows: Any, objective: GroupDRO | None = None, **fields: Any) -> Dataset:
        args = RobustDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **fields)
        return RowPreparation(args, tokenizer, objective)(rows, "eval_dataset")

    return call


def tokenised(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Rows as somebody tokenises them who keeps a column of their own."""
    made = [*tokenize_groups(load_preferences(rows).dataset, tokenizer)]
    return [{**row, "topic": topic} for row, topic in zip(made, TOPICS, strict=True)]


def test_column_becomes_the_domains_of_a_batch(rows: Any, prepare: Any, tokenizer: Any, tmp_path: Any) -> None:
    dataset = prepare(rows, domain_column="topic", robust="group_dro")
    assert dataset["domain"][:] == TOPICS
    args = RobustDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert RowPreparation(args, tokenizer).collator([*dataset])["domains"] == TOPICS


def test_rows_that_are_loaded_already_have_it_as_domain(rows: Any, prepare: Any) -> None:
    canonical = load_preferences(rows, domain_column="topic").dataset
    assert prepare(canonical, robust="group_dro")["domain"][:] == TOPICS
    assert prepare(canonical, robust="group_dro", domain_column="topic")["domain"][:] == TOPICS


@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["dicts", "data set"])
def test_rows_that_are_tokenised_already(rows: Any, prepare: Any, tokenizer: Any, kind: Any) -> None:
    made = tokenised(rows, tokenizer)
    assert prepare(kind(made), robust="group_dro", domain_column="topic")["domain"][:] == TOPICS
    stale = kind([{**row, "domain": "old"} for row in made])
    assert prepare(stale, robust="group_dro", domain_column="topic")["domain"][:] == TOPICS
    assert prepare(stale, robust="group_dro")["domain"][:] == ["old"] * 4


def test_preparing_twice_changes_nothing(rows: Any, prepare: Any) -> None:
    once = prepare(rows, robust="group_dro", domain_column="topic")
    assert prepare(once, robust="group_dro", domain_column="topic")[:] == once[:]


@pytest.mark.parametrize("column", [None, "domain", "topic", "nowhere"])
def test_nobody_asks_nobody_gets(column: str | None, rows: Any, prepare: Any, tokenizer: Any) -> None:
    """A column that no objective reads may be missing."""
    named = [{**row, "domain": row["topic"]} for row in rows]
    assert "domain" not in prepare(named, mode="erm", domain_column=column).column_names
    assert "domain" not in prepare(tokenised(rows, tokenizer), mode="erm", domain_column=column).column_names


def test_rows_without_a_domain_are_refused_with_what_to_do(rows: Any, prepare: Any, tokenizer: Any) -> None:
    expected = r"missing field: 'domain', which is to name the row's domain; domain_column .* is one of .*topic"
    with pytest.raises(DataError, match=f"in-memory data:1: {expected}"):
        prepare(rows, robust="group_dro")
    made = tokenised(rows, tokenizer)
    made[2]["topic"] = None
    with pytest.raises(DataError, match=r"eval_dataset: row 'row-2': missing field: 'topic'"):
        prepare(made, robust="group_dro", domain_column="topic")


def test_domains_that_training_has_not_are_refused_by_name(rows: Any, prepare: Any) -> None:
    fields = {"domain_column": "topic", "robust": "group_dro"}
    assert prepare(rows, GroupDRO(["art", "law", "tax"]), **fields)["domain"][:] == TOPICS
    with pytest.raises(DataError, match=r"eval_dataset: domains: expected names among 'law', got 'art', 'tax'; only"):
        prepare(rows, GroupDRO(["law"]), **fields)


def test_column_is_a_name() -> None:
    with pytest.raises(TypeError, match="domain_column: expected the name of a column, or None, got int"):
        RobustDPOConfig(output_dir="x", use_cpu=True, domain_column=3)


def test_options_of_group_dro() -> None:
    options = {"step_size": 0.5, "domains": ["a", "b"]}
    objective = RobustDPOConfig(output_dir="x", use_cpu=True, robust="group_dro", robust_options=options).objective()
    assert isinstance(objective, GroupDRO)
    assert (objective.step_size, objective.domains) == (0.5, ("a", "b"))
    with pytest.raises(ValueError, match="robust_options: expected parameters of 'group_dro': domains, step_size, got"):
        RobustDPOConfig(output_dir="x", use_cpu=True, robust="group_dro", robust_options={"eta": 1.0})
