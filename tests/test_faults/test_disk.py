"""Disks that are full and directories that cannot be written end a run clearly, with its last checkpoint intact."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_runs import Run, assert_same_end, finish
from transformers import TrainerCallback

from robust_dpo.checkpoints import CheckpointError, check
from robust_dpo.checkpoints.draft import STAGING

WRITERS = {
    "weights": "transformers.modeling_utils.safe_save_file",
    "optimizer": "torch.save",
    "trainer-state": "transformers.trainer_callback.TrainerState.save_to_json",
    "manifest": "robust_dpo.checkpoints.draft.write_manifest",
    "rename": "pathlib.Path.rename",
}


class _At(TrainerCallback):
    """Calls a function before an optimizer step."""

    def __init__(self, step: int, function: Callable[[], Any]) -> None:
        self.step, self.function = step, function

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.function()


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """As the runs that these are compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk_names_the_path_and_keeps_the_last_checkpoint(
    writer: str, whole_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write of the second checkpoint fails for lack of space; with space again, the run goes on to the same end."""
    run = Run(tmp_path / "run")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = run.trainer(_At(3, lambda: patched.setattr(WRITERS[writer], fail)))
    with monkeypatch.context() as patched, pytest.raises(CheckpointError) as caught:
        trainer.train()
    message = str(caught.value)
    assert str(run.folder / "checkpoint-4") in message and "No space left" in message
    assert f"{run.folder / 'checkpoint-2'}, to resume from" in message
    assert [path.name for path in sorted(run.folder.iterdir())] == ["checkpoint-2"], "the space is given back"
    assert check(run.folder / "checkpoint-2")
    run.train(resume=True)
    assert_same_end(run, whole_run())


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are those of POSIX")
@pytest.mark.parametrize("limit", [4_000, 12_000, 30_000], ids=lambda limit: f"{limit}-bytes")
def test_kernel_that_refuses_a_write(limit: int, tmp_path: Path) -> None:
    """No patch: the kernel fails the write, in Rust (weights), C++ (optimizer) or Python, and nothing looks whole."""
    run = Run(tmp_path / "run")
    tmp_path.joinpath("run.log").touch()
    process = multiprocessing.get_context("forkserver").Process(target=_outcome, args=(run, limit))
    process.start()
    process.join(120)
    assert process.exitcode == 0, run.output()
    assert not [*run.folder.glob("checkpoint-*")] and not (run.folder / STAGING).exists()
    message = (tmp_path / "message").read_text()
    assert message.startswith(f"CheckpointError: {run.folder / 'checkpoint-2'}: the checkpoint cannot be written")
    assert "there is none before it" in message and "MB are free there" in message


def _outcome(run: Run, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trainer = run.trainer()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        trainer.train()
    except CheckpointError as error:
        text = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run.folder.with_name("message").write_text(text)


def test_small_disk(whole_run: Callable[..., Run], tmp_path: Path) -> None:
    """A file system of half a megabyte fills up after some checkpoints; in a larger one the run goes on."""
    whole = whole_run(save_total_limit=None, save_steps=1)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; from pathlib import Path; from faulty_runs import Run\n"
        "from robust_dpo.checkpoints import CheckpointError\n"
        "options = {'save_total_limit': None, 'save_steps': 1}\n"
        "try: Run(Path(sys.argv[1]) / 'run', options=options).train()\n"
        "except CheckpointError as error: print('CheckpointError', error)\n"
    )
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    inside = f"mount -t tmpfs -o size=512k none {disk} && {sys.executable} {script} {disk} && cp -r {disk} {kept}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("needs a user name space to mount a small disk in")
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", inside], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (message,) = [line for line in done.stdout.splitlines() if line.startswith("CheckpointError")]
    left = sorted(path.name for path in (kept / "run").iterdir())
    assert left and all(check(kept / "run" / name) for name in left)
    assert f"{left[-1]}, to resume from" in message and "MB are free there" in message
    run = Run(kept / "run", options=whole.options)
    assert finish(run, resume=True) == 0, run.output()
    assert_same_end(run, whole)


def test_directory_that_cannot_be_written_is_found_before_the_training(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    trainer = run.trainer(_At(0, lambda: pytest.fail("the training has begun")))
    run.folder.rmdir()
    run.folder.write_text("a file")
    with pytest.raises(CheckpointError, match=f"output_dir: expected a directory .* {run.folder}"):
        trainer.train()


def test_directory_that_is_lost_on_the_way(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    moved = tmp_path / "moved"

    def lose() -> None:
        run.folder.rename(moved)
        run.folder.write_text("a file")

    with pytest.raises(CheckpointError, match=f"{run.folder / 'checkpoint-4'}: the checkpoint cannot be written"):
        run.trainer(_At(3, lose)).train()
    assert check(moved / "checkpoint-2")


def test_run_without_checkpoints_needs_no_directory(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", options={"save_strategy": "no", "max_steps": 1})
    trainer = run.trainer()
    run.folder.rmdir()
    trainer.train()
    assert not run.folder.exists()
