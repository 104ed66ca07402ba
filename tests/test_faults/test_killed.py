"""Runs that are killed end, once resumed, with the bits of one that was not."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_runs import Run, assert_same_end, changes, finish, has_checkpoint, start

SETUPS = {
    "dropout": ("dropout", {}),
    "lora": ("lora", {}),
    "precomputed": ("dropout", {"precompute_ref_log_probs": True}),
    "domains": ("dropout", {"robust": "group_dro", "robust_options": {"step_size": 1.0}}),
    "one-checkpoint": ("dropout", {"save_total_limit": 1, "save_steps": 3}),
    "best": ("dropout", {"load_best_model_at_end": True, "save_steps": 3, "save_total_limit": 1}),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_killed_before_a_change_of_its_files(setup: str, whole_run: Callable[..., Run], tmp_path: Path) -> None:
    model, options = SETUPS[setup]
    whole, run = whole_run(model, **options), Run(tmp_path / "run", model, options)
    _kill_and_resume(run, whole, random.randrange(changes(whole)))


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["dropout", "one-checkpoint"])
def test_killed_before_every_single_change(setup: str, whole_run: Callable[..., Run], tmp_path: Path) -> None:
    model, options = SETUPS[setup]
    whole = whole_run(model, **options)
    for place in range(changes(whole)):
        run = Run(tmp_path / "run", model, options)
        _kill_and_resume(run, whole, place)
        shutil.rmtree(run.folder)


@pytest.mark.parametrize("places", [3, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_killed_while_a_checkpoint_of_the_same_step_is_replaced(
    places: int | None, whole_run: Callable[..., Run], tmp_path: Path
) -> None:
    """At no point of a save that replaces the only checkpoint is there none to go on from."""
    whole = whole_run(max_steps=4, save_steps=4)
    again = Run(tmp_path / "again", whole.model, whole.options)
    shutil.copytree(whole.folder, again.folder)
    assert finish(again) == 0, again.output()
    total = changes(again)
    for place in range(total) if places is None else random.sample(range(total), places):
        run = Run(tmp_path / "run", whole.model, whole.options)
        shutil.copytree(whole.folder, run.folder)
        run.end.unlink()
        # At the last step nothing is left to train, and nothing may be.
        _kill_and_resume(run, whole, place)
        shutil.rmtree(run.folder)


def _kill_and_resume(run: Run, whole: Run, place: int) -> None:
    """End a process before a change of a file of its run, and let another one end the run."""
    assert finish(run, kill_at=place) == -signal.SIGKILL, f"change {place}: {run.output()}"
    assert finish(run, has_checkpoint(run)) == 0, f"killed at change {place}: {run.output()}"
    assert_same_end(run, whole)


def _writes_a_checkpoint(run: Run, since: float) -> bool:
    """Whether a checkpoint is half written, and not by a process that ended before."""
    try:
        return any(path.stat().st_mtime > since for path in run.folder.glob(".incomplete/checkpoint-*"))
    except FileNotFoundError:  # just whole
        return False


def _soak(run: Run, whole: Run, kills: int, rng: random.Random) -> tuple[int, int]:
    """Kill and resume a run until it ends or has been killed often enough; kills, and those during a write."""
    killed = during_write = 0
    while killed < kills:
        begun = time.time()
        process = start(run, has_checkpoint(run))
        if rng.random() < 0.5:
            process.join(rng.uniform(0.1, 0.9))
        else:
            while process.is_alive() and not _writes_a_checkpoint(run, begun):
                process.join(0.001)
            process.join(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, run.output()
        killed += 1
        during_write += (run.folder / ".incomplete").is_dir()
    else:
        assert finish(run, has_checkpoint(run)) == 0, run.output()
    assert_same_end(run, whole)
    return killed, during_write


@pytest.mark.parametrize(
    "cycles", [50, pytest.param(1000, marks=pytest.mark.exhaustive)], ids=lambda cycles: f"{cycles}-kills"
)
def test_soak(cycles: int, whole_run: Callable[..., Run], tmp_path: Path) -> None:
    """SIGKILL at random moments in runs of different kinds; half of them soon after a checkpoint was begun."""
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    killed = during_write = 0
    while killed < cycles:
        model, options = rng.choice([*SETUPS.values()])
        run = Run(tmp_path / f"run{killed}", model, options)
        more, writes = _soak(run, whole_run(model, **options), cycles - killed, rng)
        killed, during_write = killed + more, during_write + writes
        shutil.rmtree(run.folder, ignore_errors=True)
    assert during_write > cycles // 10, f"seed {seed}: of {killed} kills {during_write} were during a write"
