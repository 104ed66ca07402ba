"""The demo with tiny sizes: what it writes, that it repeats, and that it takes real data and a saved model."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import datasets
import pytest

from robust_dpo.demo import DemoSettings, run_demo
from robust_dpo.demo.corpus import load_corpus
from robust_dpo.demo.present import COLUMNS, markdown, notes, table_rows, write
from robust_dpo.demo.settings import Budget
from robust_dpo.demo.start import build_tokenizer
from robust_dpo.errors import DataError

TINY = Budget(
    train_pairs=60,
    held_out_pairs=24,
    vocab_size=300,
    hidden_size=16,
    layers=1,
    heads=2,
    max_length=96,
    warmup_epochs=1,
    warmup_learning_rate=3e-3,
    epochs=1,
    batch_size=12,
    learning_rate=3e-3,
)


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs without sources, one of them unusable."""
    rng = random.Random(11)
    words = [f"word{index}" for index in range(60)]
    rows = [
        {
            "prompt": f"Question {index}: {' '.join(rng.choices(words, k=5))}?",
            "chosen": " ".join(["please", *rng.choices(words[:40], k=6)]),
            "rejected": " ".join(["never", *rng.choices(words[20:], k=6)]),
        }
        for index in range(120)
    ]
    rows.append({"prompt": "Empty?", "chosen": "yes", "rejected": ""})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_world_twice_gives_the_same_numbers(tmp_path: Path) -> None:
    lines: list[str] = []
    results = [run_demo(DemoSettings(tmp_path / name, TINY, seed=4), log=lines.append) for name in ("a", "b")]
    first, second = (result.to_dict() for result in results)
    for result in (first, second):
        for arm in result["arms"]:
            arm["seconds"] = arm["run"] = None
    assert first["arms"] == second["arms"]
    assert [arm["mode"] for arm in first["arms"]] == ["start", "erm", "dora"]
    plain, robust = first["arms"][1:]
    assert plain["ess"] == pytest.approx(12)
    assert 1 <= robust["ess"] < 12
    assert robust["held_out"] != plain["held_out"]

    paths = write(results[0])
    assert {path.name for path in paths} >= {"held_out.png", "loss.png", "weights.png", "demo.md", "results.json"}
    assert all(path.stat().st_size > 0 for path in paths)
    page = (tmp_path / "a" / "demo.md").read_text()
    assert "| plain DPO |" in page
    assert "plots/held_out.png" in page
    assert json.loads((tmp_path / "a" / "results.json").read_text())["arms"][2]["mode"] == "dora"
    for mode in ("erm", "dora"):
        assert (tmp_path / "a" / mode / "model" / "tokenizer.json").is_file()
        assert (tmp_path / "a" / mode / "metrics.jsonl").is_file()
    with pytest.raises(FileExistsError, match="already holds files"):
        run_demo(DemoSettings(tmp_path / "a", TINY), log=lines.append)


def test_real_pairs_several_seeds_and_a_saved_model(tmp_path: Path, dialogues: Path) -> None:
    settings = DemoSettings(tmp_path / "scratch", TINY, data=str(dialogues), seeds=2, trusted=0.4, corruption=0.3)
    result = run_demo(settings, log=lambda line: None)
    assert len(result.arms) == 6
    rows = table_rows(result)
    assert all(len(row.cells) == len(COLUMNS) for row in rows)
    assert all("±" in row.cells[1] for row in rows)
    assert any("over 2 seeds" in note for note in notes(result))
    assert "reversed" in markdown(result, [])

    saved = tmp_path / "scratch" / "seed-0" / "start"
    again = DemoSettings(tmp_path / "saved", TINY, data=str(dialogues), model=str(saved), trusted=0.4, modes=("dro",))
    pretrained = run_demo(again, log=lambda line: None)
    assert [arm.mode for arm in pretrained.arms] == ["start", "dro"]
    assert write(pretrained)


def test_corpus_of_real_pairs_reverses_untrusted_training_labels_only(tmp_path: Path, dialogues: Path) -> None:
    settings = DemoSettings(tmp_path, TINY, data=str(dialogues), corruption=0.4, trusted=0.25)
    corpus = load_corpus(settings, seed=3)
    trusted, corrupted = corpus.train["trusted"][:], corpus.train["corrupted"][:]
    assert sum(corrupted) == round(0.4 * len(corpus.train))
    assert not any(a and b for a, b in zip(trusted, corrupted, strict=True))
    for row in corpus.train:
        assert row["responses"][0].startswith("never" if row["corrupted"] else "please")
    assert all(row["responses"][0].startswith("please") for row in corpus.held_out)
    assert all(row["responses"][0].startswith("please") for row in corpus.corrupted)
    assert not set(corpus.train["prompt"]) & set(corpus.held_out["prompt"])


def test_corpus_of_the_world_spares_human_labels(tmp_path: Path) -> None:
    corpus = load_corpus(DemoSettings(tmp_path, TINY), seed=0)
    assert sum(corpus.train["corrupted"]) == 24
    assert all("human" not in row["sources"] for row in corpus.train if row["corrupted"])
    assert "corrupted" not in corpus.held_out.column_names


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "chosen": "a", "rejected": "b"}) + "\n" for i in range(20)))
    with pytest.raises(DataError, match="too few"):
        load_corpus(DemoSettings(tmp_path, TINY, data=str(path)), seed=0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seeds", 0, "seeds: expected at least 1, got 0"),
        ("corruption", 1.0, "corruption: expected a share in"),
        ("trusted", 0.0, "trusted: expected a share in"),
        ("modes", (), "modes: expected different modes among"),
        ("modes", ("erm", "erm"), "modes: expected different modes among"),
        ("modes", ("best",), "modes: expected different modes among"),
    ],
)
def test_bad_settings(tmp_path: Path, field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoSettings(tmp_path, TINY, **{field: value})


@pytest.mark.parametrize("text", ["plain", "ünïcödé", "日本語 🎉", "tabs\tand\nlines", "  spaces  "])
def test_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = build_tokenizer(["some training text"], 300, 64)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_chat_template_has_an_exact_boundary() -> None:
    tokenizer = build_tokenizer(["some training text"], 300, 64)
    head = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(head, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*head, {"role": "assistant", "content": "Hi"}], tokenize=False)
    assert whole == prompt + "Hi"
