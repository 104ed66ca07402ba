"""Reference log-probs that are computed once: when they are taken from the cache, and when not."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig
from torch import Tensor

from robust_dpo.data import PreferenceCollator
from robust_dpo.errors import DataError
from robust_dpo.reference_cache import ReferenceCache
from robust_dpo.trainer import precompute
from robust_dpo.trainer.reference import FrozenModel, PolicyWithoutAdapter

RUN = "robust_dpo.trainer.precompute"


class Passes:
    """Groups that references were run on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups = 0
        self.fail_after: int | None = None
        for kind in (FrozenModel, PolicyWithoutAdapter):
            monkeypatch.setattr(kind, "logps", self._counting(kind.logps))

    def _counting(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def logps(reference: Any, policy: Any, batch: dict[str, Any]) -> Tensor:
            if self.fail_after is not None and self.groups >= self.fail_after:
                raise KeyboardInterrupt
            self.groups += len(batch["group_sizes"])
            return run(reference, policy, batch)

        return logps

    def taken(self) -> int:
        """Groups since the last call."""
        groups, self.groups = self.groups, 0
        return groups


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


@pytest.fixture
def make(make_trainer: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """A trainer with precomputed reference log-probs, whose cache is in `tmp_path / "cache"`."""
    return lambda *args, **options: make_trainer(
        *args, **{"precompute_ref_log_probs": True, "cache_dir": str(tmp_path / "cache"), **options}
    )


def stored(trainer: Any) -> list[list[float]]:
    return trainer.train_dataset["ref_logps"][:]


SAMPLE = 4
ROWS = 12


def test_second_run_reads_what_the_first_one_wrote(
    make: Callable[..., Any], build_rows: Callable[..., Any], passes: Passes, tmp_path: Path
) -> None:
    options = {"train_dataset": build_rows(ROWS, size=3), "eval_dataset": build_rows(5, seed=2)}
    first = make(**options)
    assert passes.taken() == ROWS + 5
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("ref_logps*")}
    assert len(files) == 2 and all(name.endswith(".arrow") for name in files)
    second = make(**options, output_dir=str(tmp_path / "other"))
    assert passes.taken() == 2 * SAMPLE, "only a sample of each data set"
    assert stored(second) == stored(first)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("ref_logps*")} == files
    mapped = {Path(file["filename"]).name for file in second.train_dataset.cache_files}
    assert mapped & files.keys(), "memory-mapped"
    second.train()
    assert passes.taken() == 0


def test_log_probs_are_beside_the_output_unless_asked_for_elsewhere(make: Callable[..., Any], tmp_path: Path) -> None:
    make(cache_dir=None)
    assert [path.suffix for path in (tmp_path / "run" / "reference_cache").iterdir()] == [".arrow"]


LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)

QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


class MaskingCollator(PreferenceCollator):
    """The end of a response does not count."""

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = super().__call__(rows)
        batch["labels"].scatter_(1, batch["attention_mask"].sum(1, keepdim=True) - 1, -100)
        return batch


CHANGES: dict[str, dict[str, Any]] = {
    "another model": {"model": {"seed": 1}},
    "one weight": {"weight": 1e-6},
    "dtype": {"model": {"dtype": torch.bfloat16}},
    "another configuration": {"model": {"rms_norm_eps": 1e-3}},
    "truncation": {"max_length": 15},
    "limits that cut nothing": {"max_length": 500},
    "autocast": {"bf16": True},
    "head route": {"head_route": "logits"},
    "chat template": {"template": "{{ messages }}"},
    "rows": {"rows": {"seed": 5}},
    "one row fewer": {"rows": {"count": ROWS - 1}},
    "ref_model": {"reference": 3},
    "adapter": {"peft_config": LORA},
    "collator": {"data_collator": MaskingCollator(0)},
}


def build(
    make: Callable[..., Any],
    build_model: Callable[..., Any],
    build_rows: Callable[..., Any],
    tokenizer: Any,
    change: Any,
) -> Any:
    """A trainer that differs in one thing."""
    change = dict(change)
    model = build_model(**{name: value for name, value in change.get("model", {}).items() if name != "dtype"})
    model = model.to(change.pop("model", {}).get("dtype", torch.float32))
    if "weight" in change:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] += change.pop("weight")
    if "reference" in change:
        change["ref_model"] = build_model(seed=change.pop("reference"))
    tokenizer.chat_template = change.pop("template", None)
    rows = build_rows(**{"count": ROWS, **change.pop("rows", {})})
    return make(model, train_dataset=rows, processing_class=tokenizer, **change)


@pytest.mark.parametrize("change", CHANGES.values(), ids=[*CHANGES])
def test_what_changes_the_log_probs_misses_the_cache(
    change: dict[str, Any],
    make: Callable[..., Any],
    build_model: Callable[..., Any],
    build_rows: Callable[..., Any],
    tokenizer: Any,
    passes: Passes,
) -> None:
    parts = (make, build_model, build_rows, tokenizer)
    before = stored(build(*parts, {}))
    passes.taken()
    rows = len(build(*parts, change).train_dataset)
    assert passes.taken() == rows
    assert stored(build(*parts, {})) == before
    assert passes.taken() == SAMPLE, "both are kept"


@pytest.mark.parametrize(
    "options",
    [{"precompute_ref_batch_size": 5}, {"learning_rate": 1e-5}, {"loss_type": "ipo"}, {"dataloader_num_workers": 1}],
    ids=lambda options: next(iter(options)),
)
def test_what_does_not_change_them_hits_it(options: dict[str, Any], make: Callable[..., Any], passes: Passes) -> None:
    before = stored(make())
    passes.taken()
    assert stored(make(**options)) == before
    assert passes.taken() == SAMPLE


def test_adapter_of_the_policy_is_no_part_of_its_reference(
    make: Callable[..., Any], build_model: Callable[..., Any], passes: Passes
) -> None:
    found = []
    for seed in range(2):
        model = build_model()
        torch.manual_seed(seed)  # the adapter's random start
        found.append(make(model, peft_config=LORA))
        assert passes.taken() == (SAMPLE if seed else ROWS)
    weights = [trainer.model.get_parameter(f"{QUERY}.lora_A.default.weight") for trainer in found]
    assert not torch.equal(*weights)
    assert stored(found[0]) == stored(found[1])


def test_values_do_not_depend_on_batches_or_workers(make: Callable[..., Any], tmp_path: Path) -> None:
    found = [
        stored(make(cache_dir=str(tmp_path / f"cache-{number}"), precompute_ref_batch_size=size, **options))
        for number, (size, options) in enumerate([(1, {}), (5, {"dataloader_num_workers": 1}), (100, {})])
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)


@pytest.mark.parametrize("batches_per_read", [1, 3])
def test_killed_run_goes_on_where_it_was(
    batches_per_read: int,
    make: Callable[..., Any],
    build_rows: Callable[..., Any],
    passes: Passes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(precompute, "_BATCHES_PER_READ", batches_per_read)
    rows = build_rows(ROWS, size=2) + [{**row, "id": f"other {row['id']}"} for row in build_rows(ROWS, size=3, seed=4)]
    options = {"train_dataset": rows, "precompute_ref_batch_size": 2}
    expected = stored(make(**options, cache_dir=str(tmp_path / "whole")))
    passes.taken()
    passes.fail_after = 14
    with pytest.raises(KeyboardInterrupt):
        make(**options)
    assert passes.taken() == 14
    (journal,) = (tmp_path / "cache").glob("*.partial")
    # Torn in the middle of a record, as a power cut would.
    journal.write_bytes(journal.read_bytes()[:-3])
    passes.fail_after = None
    again = make(**options)
    kept = 14 // (2 * batches_per_read) - 1
    assert passes.taken() == 2 * ROWS - kept * 2 * batches_per_read
    np.testing.assert_allclose(
        [number for row in stored(again) for number in row], [n for row in expected for n in row], rtol=1e-5
    )
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".arrow"}


def _cut(path: Path, whole: bytes) -> None:
    path.write_bytes(whole[: len(whole) // 2])


def _flip(path: Path, whole: bytes) -> None:
    path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])


def _empty(path: Path, whole: bytes) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _flip, _empty])
def test_torn_cache_is_computed_again_with_a_message(
    damage: Callable[[Path, bytes], None],
    make: Callable[..., Any],
    passes: Passes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = stored(make())
    passes.taken()
    (path,) = (tmp_path / "cache").glob("ref_logps*.arrow")
    damage(path, path.read_bytes())
    with caplog.at_level(logging.WARNING, RUN):
        assert stored(make()) == before
    assert passes.taken() == ROWS
    assert "reference log-probs of the training data are computed again" in caplog.text
    make()
    assert passes.taken() == SAMPLE


def test_cache_whose_values_are_wrong_is_computed_again(
    make: Callable[..., Any],
    passes: Passes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file with the right key and checksum and wrong numbers: what another machine may have computed wrongly."""
    save = ReferenceCache.save
    with monkeypatch.context() as patch:
        patch.setattr(ReferenceCache, "save", lambda cache, key, values, sizes: save(cache, key, 1.01 * values, sizes))
        wrong = stored(make())
    passes.taken()
    with caplog.at_level(logging.WARNING, RUN):
        right = stored(make())
    assert passes.taken() == SAMPLE + ROWS
    np.testing.assert_allclose(wrong, 1.01 * np.array(right), rtol=1e-6)
    assert "a response of log-prob" in caplog.text


def test_a_miss_says_what_is_different(
    make: Callable[..., Any], build_rows: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    make()
    with caplog.at_level(logging.INFO, RUN):
        make(max_length=16)
    assert "the closest entry has another rows, truncation" in caplog.text.replace(
        "truncation, rows", "rows, truncation"
    )


def test_two_runs_at_once(
    make: Callable[..., Any], passes: Passes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second finds the journal taken, works without one, and both end with the same file."""
    inner: list[Any] = []
    run = precompute.Precomputation._compute

    def compute(self: Any, *args: Any) -> Any:
        if not inner:
            inner.append(None)
            inner[0] = stored(make())
        return run(self, *args)

    monkeypatch.setattr(precompute.Precomputation, "_compute", compute)
    assert stored(make()) == inner[0]
    assert passes.taken() == 2 * ROWS
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".arrow"}


def test_a_reference_without_finite_log_probs_is_refused_by_row(
    make: Callable[..., Any], build_rows: Callable[..., Any], build_model: Callable[..., Any], tokenizer: Any
) -> None:
    rows = [{**row, "prompt": row["prompt"].replace("w7", "w8").replace("w88", "w8")} for row in build_rows(ROWS)]
    rows = [{**row, "responses": [text.replace("w7", "w8") for text in row["responses"]]} for row in rows]
    rows[5]["prompt"] += " w7"
    model = build_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("w7")] = float("nan")
    with pytest.raises(DataError, match="row row-5: the reference gives a response of it no finite log-prob"):
        make(model, train_dataset=rows)


def test_trained_policy_resumes_with_the_cache_of_its_start(
    make: Callable[..., Any], build_model: Callable[..., Any], passes: Passes, tmp_path: Path
) -> None:
    whole = make(build_model(), save_strategy="steps", save_steps=2, max_steps=4)
    passes.taken()
    whole.train()
    resumed = make(build_model(), output_dir=str(tmp_path / "resumed"), max_steps=4)
    assert passes.taken() == SAMPLE
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [2, 7])
def test_half_precision_rounds_differently_and_is_still_found(
    size: int, make: Callable[..., Any], passes: Passes
) -> None:
    before = stored(make(bf16=True))
    passes.taken()
    assert stored(make(bf16=True, precompute_ref_batch_size=size, layout="padded")) == before
    assert passes.taken() == SAMPLE


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_trainer.conftest import _build_model, _build_rows
from transformers import AutoTokenizer
from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer, precompute

precompute._BATCHES_PER_READ = 2
append = precompute.Journal.append
records = []

def append_and_die(journal, values):
    append(journal, values)
    records.append(len(values))
    if len(records) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

precompute.Journal.append = append_and_die
args = RobustDPOConfig(
    output_dir={out!r}, precompute_ref_log_probs=True, precompute_ref_batch_size=2, cache_dir={cache!r},
    use_cpu=True, report_to="none", disable_tqdm=True,
)
RobustDPOTrainer(
    _build_model(), args=args, train_dataset=_build_rows(24), processing_class=AutoTokenizer.from_pretrained({out!r})
)
"""


@pytest.mark.slow
def test_killed_process_leaves_what_the_next_one_goes_on_with(
    make: Callable[..., Any], build_rows: Callable[..., Any], tokenizer: Any, passes: Passes, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "run")
    places = {"tests": str(Path(__file__).parents[1]), "out": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    script = KILLED.format(**places)
    killed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    # Three records of two batches of two rows.
    again = make(train_dataset=build_rows(24), precompute_ref_batch_size=5)
    assert passes.taken() == 24 - 3 * 2 * 2
    whole = make(train_dataset=build_rows(24), cache_dir=str(tmp_path / "other"))
    np.testing.assert_allclose(stored(again), stored(whole), rtol=1e-5)


def test_token_ids_are_kept_where_asked(
    make_trainer: Callable[..., Any], build_rows: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    calls: list[int] = []
    encode = "robust_dpo.data.tokenize._encode_batch"
    from robust_dpo.data import tokenize

    run = tokenize._encode_batch
    monkeypatch.setattr(encode, lambda batch, **rest: calls.append(len(batch["id"])) or run(batch, **rest))
    first = make_trainer(train_dataset=build_rows(ROWS), cache_dir=cache)
    second = make_trainer(train_dataset=build_rows(ROWS), cache_dir=cache)
    assert calls == [ROWS]
    assert second.train_dataset[:] == first.train_dataset[:]
    make_trainer(train_dataset=build_rows(ROWS), cache_dir=cache, max_length=20)
    make_trainer(train_dataset=build_rows(ROWS, seed=1), cache_dir=cache)
    make_trainer(train_dataset=build_rows(ROWS))
    assert calls == [ROWS] * 4


def test_rows_of_a_selected_data_set(make: Callable[..., Any], tmp_path: Path) -> None:
    """Tokenised rows with an indices mapping: log-probs belong to the rows as they are seen."""
    whole = make()
    whole.train_dataset.remove_columns("ref_logps").save_to_disk(str(tmp_path / "rows"))
    picked = [7, 2, 9, 4]
    part = make(train_dataset=load_from_disk(str(tmp_path / "rows")).select(picked))
    np.testing.assert_allclose(stored(part), [stored(whole)[index] for index in picked], rtol=1e-5)
    assert part.train_dataset["id"][:] == [f"row-{index}" for index in picked]
