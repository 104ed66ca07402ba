"""What a manifest notices, and which checkpoint is taken instead."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from robust_dpo.checkpoints import (
    BrokenCheckpoint,
    check,
    checkpoint_to_resume,
    last_whole_checkpoint,
    write_manifest,
)
from robust_dpo.checkpoints.draft import STAGING, Draft
from robust_dpo.checkpoints.manifest import FILE_NAME
from robust_dpo.checkpoints.record import RUN_FILE


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Step → a folder of files of random size, one of them in a sub-folder, with its manifest."""

    def make(step: int, directory: Path = tmp_path) -> Path:
        folder = directory / f"checkpoint-{step}"
        for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "shards/part.bin"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(random.randbytes(random.choice([1, 4096, (1 << 20) + 1])))
        write_manifest(folder)
        return folder

    return make


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "truncated": _truncate,
    "empty": lambda path: path.write_bytes(b"") and None,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x") and None,
    "one-bit": _flip_one_bit,
}


def test_whole_checkpoint_is_accepted(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(1)
    assert check(folder)
    (folder / "notes.txt").write_text("of the user")
    assert check(folder), "what was not written by the run is nobody's business"


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "shards/part.bin"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(damage: str, name: str, make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(1)
    DAMAGE[damage](folder / name)
    with pytest.raises(BrokenCheckpoint, match=name):
        check(folder)


@pytest.mark.parametrize("size", [0, 1, 100])
def test_torn_manifest_is_found(size: int, make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(1)
    (folder / FILE_NAME).write_bytes((folder / FILE_NAME).read_bytes()[:size])
    with pytest.raises(BrokenCheckpoint, match="torn"):
        check(folder)


def test_manifest_of_a_later_format_is_not_guessed_at(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(1)
    (folder / FILE_NAME).write_text(json.dumps({"format": 2, "files": {}}))
    with pytest.raises(BrokenCheckpoint, match="newer version"):
        check(folder)


@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_checkpoint_is_passed_over_with_a_message(
    damage: str, make_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # In the order of steps, not of names: checkpoint-9 sorts after checkpoint-10.
    make_checkpoint(8)
    before, last = make_checkpoint(9), make_checkpoint(10)
    DAMAGE[damage](last / "optimizer.pt")
    assert checkpoint_to_resume(True, tmp_path) == str(before)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert str(last) in message and "optimizer.pt" in message


def test_no_whole_checkpoint_is_an_error_that_names_the_broken_ones(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    for step in (1, 2):
        (make_checkpoint(step) / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="none that is whole: checkpoint-2, checkpoint-1"):
        last_whole_checkpoint(tmp_path)


def test_broken_checkpoint_that_was_asked_for_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Somebody who names a checkpoint does not want another one."""
    good, broken = make_checkpoint(1), make_checkpoint(2)
    _flip_one_bit(broken / "model.safetensors")
    assert checkpoint_to_resume(str(good), tmp_path) == str(good)
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*{broken}: the content of model.safetensors"):
        checkpoint_to_resume(broken, tmp_path)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (3, TypeError, "resume_from_checkpoint: expected the path"),
        ("nowhere", ValueError, "nowhere, which is no directory"),
        (True, ValueError, "expected a checkpoint in .*, got none"),
    ],
    ids=["type", "absent", "none"],
)
def test_what_cannot_be_resumed_is_refused(asked: object, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        checkpoint_to_resume(asked, tmp_path)
    with pytest.raises(ValueError, match="no such directory"):
        checkpoint_to_resume(True, tmp_path / "absent")


@pytest.mark.parametrize("asked", [None, False])
def test_nothing_asked_for_is_nothing(asked: object, tmp_path: Path) -> None:
    assert checkpoint_to_resume(asked, tmp_path / "absent") is None


def test_checkpoint_of_transformers_is_used_with_a_warning(
    make_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_checkpoint(1)
    (folder / FILE_NAME).unlink()
    assert checkpoint_to_resume(True, tmp_path) == str(folder)
    assert "without being checked" in caplog.text
    (folder / "trainer_state.json").unlink()
    with pytest.raises(BrokenCheckpoint, match="neither"):
        check(folder)


def test_draft_replaces_as_a_whole(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (make_checkpoint(1) / "of_the_old_one").touch()
    draft = Draft(tmp_path, "checkpoint-1")
    draft.begin()
    make_checkpoint(1, draft.staging)
    (draft.folder / FILE_NAME).unlink()
    draft.publish()
    assert check(draft.final)
    assert not (draft.final / "of_the_old_one").exists()
    assert not (tmp_path / STAGING).exists()


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replacing"])
def test_checkpoint_that_lacks_only_its_rename_is_adopted(
    replaces: bool, make_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoint(2)
    new = make_checkpoint(4, tmp_path / STAGING)
    content = (new / "model.safetensors").read_bytes()
    if replaces:
        shutil.move(make_checkpoint(4), tmp_path / STAGING / "replaced")
    assert checkpoint_to_resume(True, tmp_path) == str(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_bytes() == content
    assert "all of this checkpoint was written" in caplog.text


def test_checkpoint_that_lacks_more_is_not(
    make_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = make_checkpoint(2)
    _truncate(make_checkpoint(4, tmp_path / STAGING) / "model.safetensors")
    assert checkpoint_to_resume(True, tmp_path) == str(before)
    assert "it is not used" in caplog.text


def test_a_checkpoint_whose_manifest_is_gone_is_not_taken_for_one_of_transformers(
    make_checkpoint: Callable[..., Path],
) -> None:
    folder = make_checkpoint(1)
    (folder / FILE_NAME).unlink()
    assert not check(folder), "plain transformers writes none"
    (folder / RUN_FILE).write_text("{}")
    with pytest.raises(BrokenCheckpoint, match="being deleted"):
        check(folder)


def test_the_last_one_is_used_where_an_older_one_was_being_deleted(
    make_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A kill in the middle of a rotation, after any number of files."""
    old = make_checkpoint(2)
    for name in (RUN_FILE, "robust_dpo_state.pt"):
        (old / name).write_bytes(b"of this package")
    write_manifest(old)
    # What is left of transformers' files alone cannot be told from a checkpoint of its own.
    kept = random.choice([RUN_FILE, "robust_dpo_state.pt", FILE_NAME])
    gone = sorted(path for path in old.rglob("*") if path.is_file() and path.name != kept)
    random.shuffle(gone)
    last = make_checkpoint(4)
    for path in gone:
        path.unlink()
        assert checkpoint_to_resume(True, tmp_path) == str(last)
        assert not caplog.records, "nobody has to know: it is older than what is used"
        with pytest.raises(ValueError, match=f"expected a whole checkpoint; .* got {old}: "):
            checkpoint_to_resume(str(old), tmp_path)
