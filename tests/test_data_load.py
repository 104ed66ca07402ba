"""Formats, sources and reports of load_preferences; bad rows are in test_data_bad_rows.py."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from robust_dpo.data import load_preferences, save_preferences
from robust_dpo.data.rows import COLUMNS
from robust_dpo.errors import DataError

PAIR = {"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Seven."}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


FORMATS = {
    "explicit prompt": (PAIR, {"prompt": "Name a colour.", "responses": [" Blue.", " Seven."]}),
    "explicit prompt, sources of each side": (
        {**PAIR, "chosen_source": "human", "rejected_source": "model"},
        {"prompt": "Name a colour.", "responses": [" Blue.", " Seven."], "sources": ["human", "model"]},
    ),
    "explicit prompt, one source": (
        {**PAIR, "source": "human"},
        {"prompt": "Name a colour.", "responses": [" Blue.", " Seven."], "sources": ["human", "human"]},
    ),
    "implicit prompt": (
        {"chosen": "Q: sky? A: blue now", "rejected": "Q: sky? A: green now"},
        {"prompt": "Q: sky? A:", "responses": [" blue now", " green now"]},
    ),
    "implicit prompt, responses that share letters": (
        {"chosen": "Say it: cartoon", "rejected": "Say it: carpet"},
        {"prompt": "Say it:", "responses": [" cartoon", " carpet"]},
    ),
    "implicit prompt, one response begins with the other": (
        {"chosen": "Say it: car", "rejected": "Say it: carpet"},
        {"prompt": "Say it:", "responses": [" car", " carpet"]},
    ),
    "implicit prompt, no spaces between words": (
        {"chosen": "问题：天空是什么颜色？蓝色", "rejected": "问题：天空是什么颜色？绿色"},
        {"prompt": "问题：天空是什么颜色？", "responses": ["蓝色", "绿色"]},
    ),
    "implicit prompt, the shared part ends in punctuation": (
        {"chosen": "Well. (yes)", "rejected": "Well. [no]"},
        {"prompt": "Well.", "responses": [" (yes)", " [no]"]},
    ),
    "conversational, explicit prompt": (
        {
            "prompt": [user("Hi"), assistant("Yes?"), user("Sky?")],
            "chosen": [assistant("Blue")],
            "rejected": [assistant("7")],
        },
        {"prompt": [user("Hi"), assistant("Yes?"), user("Sky?")], "responses": ["Blue", "7"]},
    ),
    "conversational, implicit prompt": (
        {"chosen": [user("Sky?"), assistant("Blue")], "rejected": [user("Sky?"), assistant("7")]},
        {"prompt": [user("Sky?")], "responses": ["Blue", "7"]},
    ),
    "conversational, prompt repeated in the sides": (
        {"prompt": [user("Sky?")], "chosen": [user("Sky?"), assistant("Blue")], "rejected": [assistant("7")]},
        {"prompt": [user("Sky?")], "responses": ["Blue", "7"]},
    ),
    "conversational, text prompt beside whole conversations": (
        {"prompt": "Sky?", "chosen": [user("Sky?"), assistant("Blue")], "rejected": [user("Sky?"), assistant("7")]},
        {"prompt": [user("Sky?")], "responses": ["Blue", "7"]},
    ),
    "conversational, text prompt beside lone answers": (
        {"prompt": "Sky?", "chosen": [assistant("Blue")], "rejected": [assistant("7")]},
        {"prompt": [user("Sky?")], "responses": ["Blue", "7"]},
    ),
    "raw HH dialogue": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nAssistant: Blue",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nAssistant: 7",
        },
        {"prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nAssistant:", "responses": [" Blue", " 7"]},
    ),
    "DoRA, query": (
        {"query": "Sky?", "responses": ["a", "b", "c"], "scores": [1, 3.5, 1], "probs": [0.25, 0.5, 0.75]},
        {"prompt": "Sky?", "responses": ["a", "b", "c"], "scores": [1.0, 3.5, 1.0], "probs": [0.25, 0.5, 0.75]},
    ),
    "DoRA, prompt": (
        {"prompt": "Sky?", "responses": ["a", "b"], "scores": [2, 1], "probs": [0.25, 0.5]},
        {"prompt": "Sky?", "responses": ["a", "b"], "scores": [2.0, 1.0], "probs": [0.25, 0.5]},
    ),
    "canonical text": (
        {"id": 7, "prompt": "Sky?", "responses": ["a", "b"], "sources": ["human", "model"]},
        {"id": "7", "prompt": "Sky?", "responses": ["a", "b"], "sources": ["human", "model"]},
    ),
    "canonical conversation": (
        {"id": "x", "prompt": [user("Sky?")], "responses": ["a", "b"]},
        {"id": "x", "prompt": [user("Sky?")], "responses": ["a", "b"]},
    ),
}


DOMAINS = {
    "text": ({"topic": "law"}, "topic", "law"),
    "integer": ({"topic": 3}, "topic", "3"),
    "texts that are the same": ({"topic": ["law", "law"]}, "topic", "law"),
    "texts that differ": ({"topic": ["tax", "law", "tax"]}, "topic", "law+tax"),
    "domain": ({"domain": "law"}, "domain", "law"),
    "one source as sources": ({"source": "human"}, "sources", "human"),
    "sources as source": ({"sources": ["model", "human"]}, "source", "human+model"),
    "sources of each side": ({"chosen_source": "human", "rejected_source": "human"}, "source", "human"),
    "id": ({"id": 7}, "id", "7"),
}


@pytest.mark.parametrize(("fields", "column", "domain"), DOMAINS.values(), ids=DOMAINS)
def test_column_names_the_domain(fields: dict[str, Any], column: str, domain: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{**PAIR, **fields, "other": 1}])
    loaded = load_preferences(path, domain_column=column)
    assert loaded.dataset.column_names == [*COLUMNS, "domain"]
    assert loaded.dataset[0]["domain"] == domain
    assert loaded.report.ignored_columns == ("other",)
    # It stays with the rows that are written, under one name.
    saved = save_preferences(loaded, tmp_path / "canonical.jsonl")
    assert load_preferences(saved, domain_column="domain").dataset[:] == loaded.dataset[:]
    assert "domain" not in load_preferences(saved).dataset.column_names


def test_domain_column_that_is_no_name_is_refused() -> None:
    with pytest.raises(TypeError, match="domain_column: expected the name of a column, or None, got int"):
        load_preferences([PAIR], domain_column=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("row", "expected"), FORMATS.values(), ids=FORMATS)
def test_format_becomes_canonical(row: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row])
    loaded = load_preferences(path)
    assert loaded.dataset.column_names == list(COLUMNS)
    assert loaded.dataset[0] == {**dict.fromkeys(COLUMNS), "id": "rows.jsonl:1", **expected}
    assert (loaded.report.rows_read, loaded.report.rows_kept, len(loaded)) == (1, 1, 1)
    assert not loaded.report.ignored_columns


def _jsonl(path: Path) -> Path:
    return write_lines(path / "d.jsonl", [PAIR, PAIR])


def _gz(path: Path) -> Path:
    return write_lines(path / "d.jsonl.gz", [PAIR, PAIR])


def _gz_without_the_name(path: Path) -> Path:
    return write_lines(path / "d.jsonl.gz", [PAIR, PAIR]).rename(path / "d.jsonl")


def _array(path: Path) -> Path:
    (path / "d.json").write_text(json.dumps([PAIR, PAIR], indent=2))
    return path / "d.json"


def _lines_called_json(path: Path) -> Path:
    return write_lines(path / "d.json", [PAIR, PAIR])


def _byte_order_mark(path: Path) -> Path:
    (path / "d.jsonl").write_text(f"{json.dumps(PAIR)}\r\n\r\n{json.dumps(PAIR)}", encoding="utf-8-sig", newline="")
    return path / "d.jsonl"


def _parquet(path: Path) -> Path:
    datasets.Dataset.from_list([PAIR, PAIR]).to_parquet(path / "d.parquet")
    return path / "d.parquet"


def _folder(path: Path) -> Path:
    (path / "below").mkdir()
    (path / "README.md").write_text("not data")
    write_lines(path / ".hidden.jsonl", [{"not": "data"}])
    write_lines(path / "b.jsonl.gz", [PAIR])
    datasets.Dataset.from_list([PAIR]).to_parquet(path / "below" / "a.parquet")
    return path


def _saved(path: Path) -> Path:
    datasets.Dataset.from_list([PAIR, PAIR]).save_to_disk(path / "saved")
    return path / "saved"


def _saved_splits(path: Path) -> Path:
    rows = datasets.Dataset.from_list([PAIR, PAIR])
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(path / "saved")
    return path / "saved"


def _dataset(_: Path) -> datasets.Dataset:
    return datasets.Dataset.from_list([PAIR, PAIR]).with_format("numpy")


def _dataset_dict(_: Path) -> datasets.DatasetDict:
    return datasets.DatasetDict(only=datasets.Dataset.from_list([PAIR, PAIR]))


def _list(_: Path) -> list[dict[str, str]]:
    return [PAIR, PAIR]


def _text_path(path: Path) -> str:
    return str(_jsonl(path))


SOURCES = [
    _jsonl, _gz, _gz_without_the_name, _array, _lines_called_json, _byte_order_mark, _parquet, _folder, _saved,
    _saved_splits, _dataset, _dataset_dict, _list, _text_path,
]  # fmt: skip


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__.strip("_"))
def test_source(make: Any, tmp_path: Path) -> None:
    loaded = load_preferences(make(tmp_path))
    assert loaded.dataset["prompt"][:] == [PAIR["prompt"]] * 2
    assert loaded.dataset["responses"][:] == [[PAIR["chosen"], PAIR["rejected"]]] * 2
    assert len(set(loaded.dataset["id"])) == 2
    assert loaded.report.rows_kept == 2


def test_json_array_rows_know_their_lines(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(f"\n [\n{json.dumps(PAIR)},\n\n{json.dumps(PAIR)} ,{json.dumps(PAIR)}\n]\n")
    assert load_preferences(tmp_path / "d.json").dataset["id"][:] == ["d.json:3", "d.json:5", "d.json:5#2"]


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    row = {**PAIR, "chosen": "one\u2028two\x85three"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8", newline="")
    assert load_preferences(tmp_path / "d.jsonl").dataset[0]["responses"][0] == "one\u2028two\x85three"


@pytest.mark.parametrize(
    "layout", ["train.jsonl test.jsonl", "train-0.jsonl test-0.jsonl", "train/a.jsonl test/a.jsonl"]
)
def test_split_of_a_folder(layout: str, tmp_path: Path) -> None:
    for name, prompt in zip(layout.split(), ("t", "e"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, [{**PAIR, "prompt": prompt}])
    assert load_preferences(tmp_path, split="test").dataset["prompt"][:] == ["e"]
    with pytest.raises(DataError, match="named after the split 'tes'"):
        load_preferences(tmp_path, split="tes")


def test_split_of_saved_data(tmp_path: Path) -> None:
    source = _saved_splits(tmp_path)
    assert len(load_preferences(source, split="test")) == 1
    with pytest.raises(DataError, match=r"there is no split 'dev'; choose one of 'train', 'test'"):
        load_preferences(source, split="dev")


def test_hub_name_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        rows = datasets.Dataset.from_list([PAIR])
        return rows if options["split"] else datasets.DatasetDict(train=rows, test=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_preferences("someone/some-data").dataset["id"][:] == ["train:1"]
    named = load_preferences("someone/some-data", split="test[:9]", name="en")
    assert named.dataset["id"][:] == ["someone/some-data[test[:9]]:1"]
    assert calls == [
        (("someone/some-data", None), {"split": None}),
        (("someone/some-data", "en"), {"split": "test[:9]"}),
    ]


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError, ValueError, datasets.exceptions.DatasetsError])
def test_hub_failure_is_explained(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise error("the reason")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="someone/x: neither a path here nor a data set that the Hub gives: the reason"):
        load_preferences("someone/x")


def test_limit_counts_kept_rows(tmp_path: Path) -> None:
    bad = {**PAIR, "chosen": " "}
    path = write_lines(tmp_path / "d.jsonl", [bad, PAIR, bad, PAIR, PAIR])
    loaded = load_preferences(path, on_bad_row="drop", limit=2)
    assert loaded.dataset["id"][:] == ["d.jsonl:2", "d.jsonl:4"]
    assert (loaded.report.rows_read, loaded.report.rows_kept) == (4, 2)


def test_limit_leaves_later_files_alone(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [PAIR])
    (tmp_path / "b.jsonl").write_text("not opened")
    assert len(load_preferences(tmp_path, limit=1)) == 1


def test_more_rows_than_a_chunk() -> None:
    rows = [{**PAIR, "prompt": f"p{index}"} for index in range(9001)]
    loaded = load_preferences(rows)
    assert loaded.dataset["prompt"][:] == [row["prompt"] for row in rows]


def test_ids_are_unique(tmp_path: Path) -> None:
    rows = [{**PAIR, "id": name} for name in ("a", "a", "a#2", "a", "b")]
    loaded = load_preferences(write_lines(tmp_path / "d.jsonl", rows))
    assert loaded.dataset["id"][:] == ["a", "a#2", "a#2#2", "a#3", "b"]
    assert loaded.report.renamed_ids == 3


def test_a_damaged_first_row_does_not_decide_the_format(tmp_path: Path) -> None:
    dialogue = FORMATS["raw HH dialogue"][0]
    rows = [{"chosen": "no marker", "rejected": "no marker at all"}, dialogue, dialogue]
    report = load_preferences(write_lines(tmp_path / "d.jsonl", rows), on_bad_row="drop").report
    assert list(report.formats.values()) == ["raw HH dialogue"]
    assert report.dropped == {"missing field": 1}


def test_report(tmp_path: Path) -> None:
    rows = [{**PAIR, "note": 1}, *[{**PAIR, "chosen": ""}] * 5, {**PAIR, "prompt": "\t"}]
    path = write_lines(tmp_path / "d.jsonl", rows)
    report = load_preferences(path, on_bad_row="drop").report
    assert report.dropped == {"empty response": 5, "empty prompt": 1}
    assert report.ignored_columns == ("note",)
    assert str(report).splitlines() == [
        f"{path}: kept 1 of 7 rows (explicit prompt)",
        "  dropped 5: empty response",
        "  dropped 1: empty prompt",
        *[f"    {path}:{line}: empty response: responses[0] has no text" for line in (2, 3, 4)],
        f"    {path}:7: empty prompt: the prompt has no text",
        "  ignored columns: note",
    ]


def test_real_dialogues(shared_dir: Path) -> None:
    path = shared_dir / "data" / "hh_harmless_2000.jsonl.gz"
    if not path.exists():
        pytest.skip(f"needs the real data in {path}, which is not here")
    loaded = load_preferences(path, on_bad_row="drop")
    assert (loaded.report.rows_read, loaded.report.rows_kept) == (2000, 1991)
    assert loaded.report.dropped == {"mismatched prompts": 5, "empty response": 4}
    # The same by another way: cut the dialogues with split, look at every row.
    reasons: Counter[str] = Counter()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            turns = [json.loads(line)[side].split("\n\nAssistant:") for side in ("chosen", "rejected")]
            mismatched = turns[0][:-1] != turns[1][:-1]
            empty = not all(turn[-1].strip() for turn in turns)
            reasons["mismatched" if mismatched else "empty" if empty else "kept"] += 1
    assert reasons == {"kept": 1991, "mismatched": 5, "empty": 4}
    for row in loaded.dataset.select(range(200)):
        assert row["prompt"].endswith("\n\nAssistant:")
        assert all("\n\nAssistant:" not in response for response in row["responses"])
    with pytest.raises(DataError, match=r"hh_harmless_2000\.jsonl\.gz:221: mismatched prompts: .*on_bad_row='drop'"):
        load_preferences(path)
