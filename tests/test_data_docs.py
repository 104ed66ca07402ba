"""The examples of docs/data.md do what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from robust_dpo.data import FORMATS, Reason, load_preferences

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = [line for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_loads(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    row = load_preferences(tmp_path / "a.jsonl").dataset[0]
    assert [response.strip() for response in row["responses"]] in (["Blue.", "Seven."], ["Blue.", "Bluish.", "Seven."])


def test_every_format_has_an_example(tmp_path: Path) -> None:
    formats = set()
    for line in EXAMPLES:
        (tmp_path / "a.jsonl").write_text(line)
        formats |= set(load_preferences(tmp_path / "a.jsonl").report.formats.values())
    assert formats == set(FORMATS)


def test_own_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust_dpo.data.formats.FORMATS", dict(FORMATS))
    (code,) = re.findall(r"```python\n(from robust_dpo.data import Row.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    loaded = load_preferences([{"question": "x", "better": "a", "worse": "b"}])
    assert loaded.dataset[0]["responses"] == ["a", "b"]
    assert set(loaded.report.formats.values()) == {"better/worse"}


@pytest.mark.parametrize(
    "reason", [reason for reason in Reason if reason not in (Reason.NO_TOKENS, Reason.CHAT_TEMPLATE)]
)
def test_every_reason_of_the_loader_is_explained(reason: Reason) -> None:
    assert re.search(rf"\| .*{re.escape(reason.value)}.* \|", PAGE)
