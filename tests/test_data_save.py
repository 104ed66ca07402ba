"""What is saved comes back, files are whole or not there, and splits keep prompts apart."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_dpo.data import load_preferences, save_preferences, split_by_prompt
from robust_dpo.errors import DataError

ENDINGS = ["jsonl", "jsonl.gz", "parquet"]

# All of unicode that a file can hold: line and paragraph separators, control characters, emoji. Not NUL: Arrow and JSON
# allow it, but other tools cut text there, so it is no promise of ours.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
visible = st.text(characters | st.sampled_from("\u2028\u2029\x85\x1c\r\n\t👩‍🚀\ufeff"), min_size=1, max_size=20).filter(
    str.strip
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
probability = st.floats(0, 1, exclude_min=True, exclude_max=True)
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant"]), "content": visible})


@st.composite
def canonical_rows(draw: st.DrawFn, prompts: st.SearchStrategy[Any]) -> dict[str, Any]:
    responses = draw(st.lists(visible, min_size=2, max_size=4, unique=True))
    count = len(responses)
    return {
        "prompt": draw(prompts),
        "responses": responses,
        "scores": draw(st.none() | st.lists(numbers, min_size=count, max_size=count, unique=True)),
        "probs": draw(st.none() | st.lists(probability, min_size=count, max_size=count)),
        "sources": draw(st.none() | st.lists(visible, min_size=count, max_size=count)),
        "id": draw(st.none() | visible),
    }


same_kind = st.sampled_from([visible, st.lists(message, min_size=1, max_size=3)]).flatmap(
    lambda prompts: st.lists(canonical_rows(prompts), min_size=1, max_size=4)
)


@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=60, deadline=None)
@given(rows=same_kind)
def test_round_trip(rows: list[dict[str, Any]], ending: str) -> None:
    data = load_preferences(rows)
    expected = data.dataset.to_list()
    assert [{**row, "id": None} for row in expected] == [{**row, "id": None} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = save_preferences(data, Path(folder) / "below" / f"rows.{ending}")
        assert os.listdir(path.parent) == [path.name]
        again = load_preferences(path)
    assert again.dataset.to_list() == expected
    assert again.dataset.features == data.dataset.features


PAIR = {"prompt": "Name a colour.", "chosen": " Blue\u2028green.", "rejected": " Seven."}


def test_lines_stay_lines_for_every_reader(tmp_path: Path) -> None:
    path = save_preferences(load_preferences([PAIR, PAIR]), tmp_path / "rows.jsonl")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_equal_rows_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_preferences([PAIR])
    files = []
    for name, clock in (("a.jsonl.gz", 1e9), ("b.jsonl.gz", 2e9)):  # neither name nor time gets into the file
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        files.append(save_preferences(data, tmp_path / name).read_bytes())
    monkeypatch.undo()
    assert files[0] == files[1]
    assert json.loads(gzip.decompress(files[0])) == {
        "id": "row:1", "prompt": "Name a colour.", "responses": [" Blue\u2028green.", " Seven."]
    }  # fmt: skip


def test_dataset_with_more_columns_is_saved_without_them(tmp_path: Path) -> None:
    dataset = load_preferences([PAIR, {**PAIR, "prompt": "other"}]).dataset.add_column("calibration", [1.0, 2.0])
    path = save_preferences(dataset.select([1]), tmp_path / "rows.jsonl")
    again = load_preferences(path)
    assert again.dataset["id"][:] == ["row:2"]
    assert not again.report.ignored_columns


def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_preferences(load_preferences([PAIR]), tmp_path / "rows.jsonl")
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be written: no space left"):
        save_preferences(load_preferences([PAIR] * 2), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("data", "name", "error", "message"),
    [
        ([PAIR], "a.jsonl", TypeError, r"data: expected PreferenceData or a datasets\.Dataset, got list"),
        (
            datasets.Dataset.from_list([PAIR]),
            "a.jsonl",
            ValueError,
            "data: expected the canonical columns prompt and responses",
        ),
        (load_preferences([PAIR]).dataset.select([]), "a.jsonl", ValueError, "data: expected at least one row, got 0"),
        (
            load_preferences([PAIR]),
            "a.csv",
            ValueError,
            r"path: expected a name that ends in \.jsonl or \.jsonl\.gz or",
        ),
        (load_preferences([PAIR]), "file/a.jsonl", DataError, r"a\.jsonl: cannot be written: "),
    ],
    ids=["rows", "columns", "no rows", "ending", "folder is a file"],
)
def test_save_refuses(data: Any, name: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(error, match=message):
        save_preferences(data, tmp_path / name)


def numbered(count: int) -> datasets.Dataset:
    """`count` rows of which every three have the same prompt, far apart, and other responses."""
    rows = [{**PAIR, "prompt": f"prompt {index % (count // 3)}", "rejected": f"{index}"} for index in range(count)]
    return load_preferences(rows).dataset


def test_split_keeps_prompts_apart_and_rows_in_order() -> None:
    dataset = numbered(3000)
    train, held_out = split_by_prompt(dataset, 0.2, seed=3)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert sorted([*train["id"], *held_out["id"]]) == sorted(dataset["id"])
    positions = {name: index for index, name in enumerate(dataset["id"])}
    for side in (train, held_out):
        assert [positions[name] for name in side["id"]] == sorted(positions[name] for name in side["id"])
    # 1000 prompts, each held out with probability 0.2: five standard deviations are 0.063
    assert abs(len(held_out) / 3000 - 0.2) < 0.063


def test_split_depends_on_prompt_and_seed_alone() -> None:
    dataset = numbered(300)
    _, held_out = split_by_prompt(dataset, 0.3)
    _, of_some = split_by_prompt(dataset.shuffle(seed=1).select(range(150)), 0.3)
    assert set(of_some["prompt"]) <= set(held_out["prompt"])
    _, another = split_by_prompt(dataset, 0.3, seed=1)
    assert set(another["prompt"]) != set(held_out["prompt"])
    _, larger = split_by_prompt(dataset, 0.5)
    assert set(held_out["prompt"]) < set(larger["prompt"])


def test_split_is_the_same_in_another_process() -> None:
    """Not the built-in hash, which differs from process to process."""
    code = (
        "import datasets; from robust_dpo.data import split_by_prompt\n"
        "rows = datasets.Dataset.from_list([{'prompt': f'p{i}'} for i in range(40)])\n"
        "print(','.join(split_by_prompt(rows, 0.5, seed=9)[0]['prompt']))"
    )
    rows = datasets.Dataset.from_list([{"prompt": f"p{index}"} for index in range(40)])
    here = ",".join(split_by_prompt(rows, 0.5, seed=9)[0]["prompt"])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == here


def test_split_of_conversations() -> None:
    talks = [[{"role": "user", "content": f"{index % 20}"}] for index in range(60)]
    dataset = load_preferences([{"prompt": talk, "responses": ["a", "b"]} for talk in talks]).dataset
    train, held_out = split_by_prompt(dataset, 0.4)
    first, second = ({row["prompt"][0]["content"] for row in side} for side in (train, held_out))
    assert not first & second


@pytest.mark.parametrize(
    ("dataset", "fraction", "error", "message"),
    [
        ([PAIR], 0.5, TypeError, r"dataset: expected a datasets\.Dataset"),
        (datasets.Dataset.from_list([{"text": "x"}]), 0.5, ValueError, "dataset: expected a column 'prompt'"),
        (numbered(30), 0.0, ValueError, "fraction: expected a number between 0 and 1, got 0.0"),
        (numbered(30), float("nan"), ValueError, "fraction: expected a number between 0 and 1, got nan"),
        (numbered(3), 0.5, ValueError, "fraction: expected a share that leaves rows on both sides, got 0.5: "),
    ],
    ids=["rows", "no prompts", "zero", "NaN", "one prompt"],
)
def test_split_refuses(dataset: Any, fraction: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split_by_prompt(dataset, fraction)
