"""Every way in which a file or a row can be bad, with the message that it must give."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from robust_dpo.data import load_preferences
from robust_dpo.errors import DataError

GOOD_PAIR = {"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Seven."}
GOOD_LIST = {
    "prompt": "Name a colour.",
    "responses": ["Blue", "Red", "Six"],
    "scores": [3, 2, 1],
    "probs": [0.5, 0.6, 0.2],
}
GOOD_QUERY = {"query": "Name a colour.", "responses": ["Blue", "Six"], "scores": [3, 2], "probs": [0.5, 0.6]}
GOOD_TALK = {
    "chosen": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue"}],
    "rejected": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "7"}],
}
GOOD_DIALOGUE = {"chosen": "\n\nHuman: Sky?\n\nAssistant: Blue", "rejected": "\n\nHuman: Sky?\n\nAssistant: 7"}
GOOD_IMPLICIT = {"chosen": "Sky? It is blue", "rejected": "Sky? It is green"}


def talk(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


# name: (good rows of the format before it, the bad line, the message after "file:line: ")
ROWS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "invalid JSON": (GOOD_PAIR, b'{"prompt": "x", }', "invalid JSON: "),
    "cut line": (
        GOOD_PAIR,
        b'{"prompt": "x", "chosen": "a',
        "invalid JSON: Unterminated string starting at at column 27",
    ),
    "nested too deeply": (GOOD_PAIR, b"{" + b'"a":[' * 200_000, "invalid JSON: "),
    "number too long": (GOOD_PAIR, b'{"id": ' + b"9" * 5000 + b"}", "invalid JSON: Exceeds the limit"),
    "not UTF-8": (GOOD_PAIR, b'{"prompt": "caf\xe9"}', "not UTF-8: byte 0xe9 at column 16"),
    "not an object": (GOOD_PAIR, 3, "wrong type: a row must be a JSON object, got int"),
    "list for a row": (GOOD_PAIR, [1, 2], "wrong type: a row must be a JSON object, got a list"),
    "string for a row": (GOOD_PAIR, "x", "wrong type: a row must be a JSON object, got a string"),
    "lone surrogate": (GOOD_PAIR, {**GOOD_PAIR, "chosen": "\ud83d"}, r"invalid text: unpaired surrogate '\ud83d'"),
    "missing rejected": (
        GOOD_PAIR,
        {"prompt": "x", "chosen": "a"},
        "missing field: 'rejected' (the row has chosen, prompt)",
    ),
    "null chosen": (GOOD_PAIR, {**GOOD_PAIR, "chosen": None}, "missing field: 'chosen'"),
    "missing prompt": (GOOD_PAIR, {"chosen": "a", "rejected": "b"}, "missing field: 'prompt'"),
    "prompt a number": (GOOD_PAIR, {**GOOD_PAIR, "prompt": 3}, "wrong type: prompt must be a string, got int"),
    "chosen true": (GOOD_PAIR, {**GOOD_PAIR, "chosen": True}, "wrong type: chosen must be a string, got true/false"),
    "chosen an object": (GOOD_PAIR, {**GOOD_PAIR, "chosen": {}}, "wrong type: chosen must be a string, got an object"),
    "id a list": (GOOD_PAIR, {**GOOD_PAIR, "id": [1]}, "wrong type: id must be a string or an integer, got a list"),
    "one side's source": (GOOD_PAIR, {**GOOD_PAIR, "chosen_source": "h"}, "missing field: 'rejected_source'"),
    "source a number": (GOOD_PAIR, {**GOOD_PAIR, "source": 1}, "wrong type: source must be a string, got int"),
    "empty prompt": (GOOD_PAIR, {**GOOD_PAIR, "prompt": ""}, "empty prompt: the prompt has no text"),
    "blank prompt": (GOOD_PAIR, {**GOOD_PAIR, "prompt": " \n\t"}, "empty prompt: the prompt has no text"),
    "empty chosen": (GOOD_PAIR, {**GOOD_PAIR, "chosen": ""}, "empty response: responses[0] has no text"),
    "blank rejected": (GOOD_PAIR, {**GOOD_PAIR, "rejected": " "}, "empty response: responses[1] has no text"),
    "chosen is rejected": (
        GOOD_PAIR,
        {**GOOD_PAIR, "rejected": GOOD_PAIR["chosen"]},
        "identical responses: all 2 responses are the same text",
    ),
    "probs of a pair": (GOOD_PAIR, {**GOOD_PAIR, "probs": [0.5]}, "length mismatch: 2 responses but 1 probs"),
    "no responses": (
        GOOD_LIST,
        {**GOOD_LIST, "responses": []},
        "fewer than two responses: a group needs K >= 2, got 0",
    ),
    "one response": (
        GOOD_LIST,
        {**GOOD_LIST, "responses": ["a"]},
        "fewer than two responses: a group needs K >= 2, got 1",
    ),
    "responses a string": (
        GOOD_LIST,
        {**GOOD_LIST, "responses": "ab"},
        "wrong type: responses must be a list, got a string",
    ),
    "response a number": (
        GOOD_LIST,
        {**GOOD_LIST, "responses": ["a", 2, "c"]},
        "wrong type: responses[1] must be a string, got int",
    ),
    "all the same": (GOOD_LIST, {**GOOD_LIST, "responses": ["a"] * 3}, "identical responses: all 3 responses"),
    "short scores": (GOOD_LIST, {**GOOD_LIST, "scores": [1, 2]}, "length mismatch: 3 responses but 2 scores"),
    "long probs": (GOOD_LIST, {**GOOD_LIST, "probs": [0.5] * 4}, "length mismatch: 3 responses but 4 probs"),
    "short sources": (GOOD_LIST, {**GOOD_LIST, "sources": ["h"]}, "length mismatch: 3 responses but 1 sources"),
    "NaN score": (
        GOOD_LIST,
        {**GOOD_LIST, "scores": [1, float("nan"), 2]},
        "score not a finite number: scores[1] is nan",
    ),
    "infinite score": (
        GOOD_LIST,
        {**GOOD_LIST, "scores": [float("-inf"), 1, 2]},
        "score not a finite number: scores[0] is -inf",
    ),
    "score a string": (
        GOOD_LIST,
        {**GOOD_LIST, "scores": [1, 2, "3"]},
        "score not a finite number: scores[2] is a string, not a number",
    ),
    "score null": (GOOD_LIST, {**GOOD_LIST, "scores": [1, None, 3]}, "score not a finite number: scores[1] is null"),
    "score true": (
        GOOD_LIST,
        {**GOOD_LIST, "scores": [1, True, 3]},
        "score not a finite number: scores[1] is true/false",
    ),
    "score too large": (
        GOOD_LIST,
        {**GOOD_LIST, "scores": [1, 10**400, 3]},
        "score not a finite number: scores[1] is too large for a float",
    ),
    "scores an object": (GOOD_LIST, {**GOOD_LIST, "scores": {}}, "wrong type: scores must be a list, got an object"),
    "scores tied": (GOOD_LIST, {**GOOD_LIST, "scores": [2, 2, 2.0]}, "all scores tied: every score is 2.0"),
    "prob 0": (GOOD_LIST, {**GOOD_LIST, "probs": [0, 0.5, 0.5]}, "probability outside (0, 1): probs[0] is 0.0"),
    "prob 1": (GOOD_LIST, {**GOOD_LIST, "probs": [0.5, 1.0, 0.5]}, "probability outside (0, 1): probs[1] is 1.0"),
    "prob negative": (
        GOOD_LIST,
        {**GOOD_LIST, "probs": [0.5, 0.5, -0.1]},
        "probability outside (0, 1): probs[2] is -0.1",
    ),
    "prob NaN": (
        GOOD_LIST,
        {**GOOD_LIST, "probs": [0.5, float("nan"), 0.5]},
        "probability outside (0, 1): probs[1] is nan",
    ),
    "prob a string": (
        GOOD_LIST,
        {**GOOD_LIST, "probs": ["a", 0.5, 0.5]},
        "probability outside (0, 1): probs[0] is a string",
    ),
    "prompt an object": (GOOD_LIST, {**GOOD_LIST, "prompt": {}}, "wrong type: prompt must be a list, got an object"),
    "DoRA row without scores": (GOOD_QUERY, {**GOOD_QUERY, "scores": None}, "missing field: 'scores'"),
    "query a list": (GOOD_QUERY, {**GOOD_QUERY, "query": ["x"]}, "wrong type: query must be a string, got a list"),
    "dialogues that differ": (
        GOOD_DIALOGUE,
        {**GOOD_DIALOGUE, "rejected": "\n\nHuman: Sea?\n\nAssistant: 7"},
        "mismatched prompts: chosen and rejected differ before their last",
    ),
    "dialogue without a response": (
        GOOD_DIALOGUE,
        {**GOOD_DIALOGUE, "rejected": "\n\nHuman: Sky?\n\nAssistant: "},
        "empty response: responses[1] has no text",
    ),
    "dialogue without a marker": (
        GOOD_DIALOGUE,
        {**GOOD_DIALOGUE, "chosen": "\n\nHuman: Sky?"},
        r"missing field: chosen has no '\n\nAssistant:' before its response",
    ),
    "dialogue without a prompt": (
        GOOD_DIALOGUE,
        {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
        r"empty prompt: nothing stands before the last '\n\nAssistant:'",
    ),
    "nothing shared": (GOOD_IMPLICIT, {"chosen": "Blue", "rejected": "Seven"}, "empty prompt: the prompt has no text"),
    "all shared": (
        GOOD_IMPLICIT,
        {"chosen": "Sky?", "rejected": "Sky? No"},
        "empty response: responses[0] has no text",
    ),
    "same text": (GOOD_IMPLICIT, {"chosen": "Sky?", "rejected": "Sky?"}, "identical responses: chosen and rejected"),
    "unknown role": (
        GOOD_TALK,
        {**GOOD_TALK, "chosen": talk(("human", "Sky?"), ("assistant", "Blue"))},
        "message roles: chosen[0] has the unknown role 'human'; known: system, developer, user, assistant, tool",
    ),
    "user at the end": (
        GOOD_TALK,
        {**GOOD_TALK, "rejected": talk(("user", "Sky?"))},
        "message roles: the last message of rejected must be the assistant's",
    ),
    "no messages": (GOOD_TALK, {**GOOD_TALK, "chosen": []}, "message roles: the last message of chosen must be"),
    "message without content": (
        GOOD_TALK,
        {**GOOD_TALK, "chosen": [{"role": "user"}, {"role": "assistant", "content": "a"}]},
        "missing field: 'content' (the row has role)",
    ),
    "content not text": (
        GOOD_TALK,
        {**GOOD_TALK, "chosen": talk(("user", ["Sky?"]), ("assistant", "Blue"))},
        "wrong type: chosen[0].content must be a string, got a list",
    ),
    "message a string": (GOOD_TALK, {**GOOD_TALK, "chosen": ["Sky?"]}, "wrong type: chosen[0] must be a message"),
    "conversations that differ": (
        GOOD_TALK,
        {**GOOD_TALK, "chosen": talk(("user", "Sea?"), ("assistant", "Blue"))},
        "mismatched prompts: the messages before the last differ between chosen and rejected",
    ),
    "conversation that is not the prompt": (
        GOOD_TALK,
        {**GOOD_TALK, "prompt": talk(("user", "Sea?"))},
        "mismatched prompts: chosen holds messages before its response that differ from prompt",
    ),
    "nothing said before": (
        GOOD_TALK,
        {"chosen": talk(("assistant", "a")), "rejected": talk(("assistant", "b"))},
        "empty prompt: the prompt has no text",
    ),
    "text after conversations": (
        {"prompt": talk(("user", "Sky?")), "responses": ["a", "b"]},
        {"prompt": "Sky?", "responses": ["a", "b"]},
        "text and conversational prompts mixed: this prompt is text, those before are messages",
    ),
}


@pytest.mark.parametrize(("good", "bad", "message"), ROWS.values(), ids=ROWS)
def test_bad_row(good: dict[str, Any], bad: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    line = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    # a blank line before the bad one: line numbers are those of the file
    path.write_bytes(b"\n".join([json.dumps(good).encode(), b"", line, json.dumps(good).encode(), b""]))
    with pytest.raises(DataError) as refused:
        load_preferences(path)
    assert str(refused.value).startswith(f"{path}:3: {message}")
    assert str(refused.value).endswith("(on_bad_row='drop' (--on-bad-row drop) leaves such rows out and counts them)")
    assert (refused.value.path, refused.value.line) == (str(path), 3)

    loaded = load_preferences(path, on_bad_row="drop")
    assert loaded.dataset["id"][:] == ["rows.jsonl:1", "rows.jsonl:4"]
    assert sum(loaded.report.dropped.values()) == 1
    (reason,) = loaded.report.dropped
    assert message.startswith(reason)
    assert loaded.report.examples[0].startswith(f"{path}:3: {message}")


DOMAINS: dict[str, tuple[Any, str]] = {
    "absent": (
        ...,
        "missing field: 'topic', which is to name the row's domain; domain_column (--domain-column) is one of",
    ),
    "null": (None, "missing field: 'topic'"),
    "empty": ("", "missing field: 'topic'"),
    "blank": (" \t", "missing field: 'topic'"),
    "empty list": ([], "missing field: 'topic'"),
    "list of an empty text": ([""], "missing field: 'topic'"),
    "list with a null": (["law", None], "wrong type: topic[1] must be a string, got null"),
    "number with a fraction": (1.5, "wrong type: topic must name a domain, got float"),
    "true": (True, "wrong type: topic must name a domain, got true/false"),
    "object": ({"name": "law"}, "wrong type: topic must name a domain, got an object"),
    "lone surrogate": ("\ud83d", r"invalid text: unpaired surrogate '\ud83d'"),
}


@pytest.mark.parametrize(("value", "message"), DOMAINS.values(), ids=DOMAINS)
def test_row_without_a_domain(value: Any, message: str, tmp_path: Path) -> None:
    path, good = tmp_path / "rows.jsonl", {**GOOD_PAIR, "topic": "law"}
    bad = GOOD_PAIR if value is ... else {**GOOD_PAIR, "topic": value}
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, bad)))
    with pytest.raises(DataError) as refused:
        load_preferences(path, domain_column="topic")
    assert str(refused.value).startswith(f"{path}:2: {message}")
    loaded = load_preferences(path, domain_column="topic", on_bad_row="drop")
    assert loaded.dataset["domain"][:] == ["law"]
    assert sum(loaded.report.dropped.values()) == 1
    assert len(load_preferences(path)) == 2


def test_bad_row_of_parquet_names_its_row(tmp_path: Path) -> None:
    rows = [GOOD_PAIR, {**GOOD_PAIR, "rejected": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet:2: missing field: 'rejected'"):
        load_preferences(tmp_path / "rows.parquet")


def test_bad_row_in_memory_names_its_row() -> None:
    with pytest.raises(DataError, match="in-memory data:2: empty response"):
        load_preferences([GOOD_PAIR, {**GOOD_PAIR, "chosen": ""}])


LINES = "\n".join(json.dumps({**GOOD_PAIR, "prompt": f"{index} {index**9}"}) for index in range(500)).encode()

# name: (file name, bytes, message after the path), refused under either setting of on_bad_row
FILES: dict[str, tuple[str, bytes, str]] = {
    "empty file": ("a.jsonl", b"", ": empty: not one row"),
    "blank lines": ("a.jsonl", b"\n \n", ": empty: not one row"),
    "empty array": ("a.json", b"[ ]", ": empty: not one row"),
    "no usable row": (
        "a.jsonl",
        json.dumps({**GOOD_PAIR, "chosen": ""}).encode(),
        "empty response: responses[0] has no text",
    ),
    "no object": (
        "a.jsonl",
        b"1\n2\n",
        ":1: wrong type: a row must be a JSON object, got int; none of the first 2 rows",
    ),
    "plain text": (
        "a.jsonl",
        b"hello\nworld\n",
        ":1: invalid JSON: Expecting value at column 1; none of the first 2 rows",
    ),
    "UTF-16": (
        "a.jsonl",
        json.dumps(GOOD_PAIR).encode("utf-16"),
        ":1: not UTF-8: byte 0xff at column 1; none of the first",
    ),
    "unknown format": (
        "a.jsonl",
        b'{"text": "x", "label": 1}',
        ": unknown format: the columns are label, text. Known: canonical",
    ),
    "prompt only": ("a.jsonl", b'{"prompt": "x"}', ": unknown format: the columns are prompt."),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(LINES)[:-4000], ": damaged or truncated gzip after line "),
    "gzip without its end": ("a.jsonl.gz", gzip.compress(LINES)[:-4], ": damaged or truncated gzip after line "),
    "damaged gzip": ("a.jsonl.gz", gzip.compress(LINES)[:99] + b"\xff" * 99, ": damaged or truncated gzip after line "),
    "array not closed": (
        "a.json",
        f"[{json.dumps(GOOD_PAIR)}".encode(),
        ":1: invalid JSON: no ',' or ']' after this element",
    ),
    "array without a comma": ("a.json", b'[{"a": 1}\n{"a": 2}]', ":1: invalid JSON: no ',' or ']' after this element"),
    "array with a bad element": ("a.json", b'[{"a": 1},\n\n{a: 2}]', ":3: invalid JSON: Expecting property name"),
    "array not UTF-8": ("a.json", b'[{"a": 1},\n{"a": "\xe9"}]', ":2: not UTF-8: byte 0xe9"),
    "not Parquet": ("a.parquet", b"PAR1 but not really", ": not a readable Parquet file: "),
    "empty Parquet": ("a.parquet", b"", ": not a readable Parquet file: "),
    "unknown file type": (
        "a.csv",
        b"prompt,chosen,rejected",
        ": unknown file type 'csv'; known: jsonl, ndjson, json, parquet",
    ),
}


@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_bad_file(name: str, content: bytes, message: str, on_bad_row: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        load_preferences(path, on_bad_row=on_bad_row)
    assert str(refused.value).startswith(str(path))
    assert message in str(refused.value)


def test_file_without_a_usable_row_is_refused_when_dropping(tmp_path: Path) -> None:
    bad = json.dumps({**GOOD_PAIR, "chosen": ""}) + "\n"
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD_PAIR))
    (tmp_path / "b.jsonl").write_text(bad * 5)
    with pytest.raises(DataError, match=r"b\.jsonl: not one of its 5 rows can be used: .*b\.jsonl:1: empty response"):
        load_preferences(tmp_path, on_bad_row="drop")


def test_damage_at_the_end_is_refused_when_dropping(tmp_path: Path) -> None:
    """Nobody knows how many rows are lost, so that they cannot be counted."""
    (tmp_path / "a.json").write_text(f"[{json.dumps(GOOD_PAIR)},\n{json.dumps(GOOD_PAIR)},")
    with pytest.raises(DataError, match=r"a\.json:2: invalid JSON"):
        load_preferences(tmp_path / "a.json", on_bad_row="drop")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", "nowhere/at/all: no such file or folder"),
        ("./missing.jsonl", r"./missing\.jsonl: no such file or folder"),
        ("missing.jsonl.gz", r"missing\.jsonl\.gz: no such file or folder"),
        ([], "in-memory data: empty: not one row"),
        (datasets.DatasetDict(), "in-memory data: there is no split 'train'"),
    ],
    ids=["path", "relative path", "file name", "empty list", "no splits"],
)
def test_nothing_there(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_preferences(source)


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(DataError, match="no data file in this folder"):
        load_preferences(tmp_path)


def test_damaged_saved_data(tmp_path: Path) -> None:
    datasets.Dataset.from_list([GOOD_PAIR]).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="saved: not a readable data set of save_to_disk"):
        load_preferences(tmp_path / "saved")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"source": 3},
            TypeError,
            "source: expected a path, a Hub name, a datasets.Dataset or a list of rows, got int",
        ),
        ({"on_bad_row": "skip"}, ValueError, "on_bad_row: expected 'error' or 'drop', got 'skip'"),
        ({"limit": 0}, ValueError, "limit: expected at least 1, got 0"),
        ({"limit": 1.5}, TypeError, "limit: expected an integer or None, got float"),
        ({"split": "train"}, ValueError, "split: expected None: data in memory has no splits, got 'train'"),
    ],
    ids=["source", "on_bad_row", "limit", "limit type", "split"],
)
def test_bad_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        load_preferences(**{"source": [GOOD_PAIR], **arguments})


@pytest.mark.parametrize("option", ["split", "name"])
def test_file_has_no_splits_or_configurations(option: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD_PAIR))
    with pytest.raises(ValueError, match=f"{option}: expected None: .*got 'x'"):
        load_preferences(tmp_path / "a.jsonl", **{option: "x"})
