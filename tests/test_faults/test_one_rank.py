"""What only one of two ranks cannot do ends both, with the same message: a rank that nobody tells waits for ever."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faulty_runs import Run, environments, finish_ranks, sharded

from robust_dpo import reference_cache
from robust_dpo.checkpoints import write_manifest

OPTIONS = {"ddp_backend": "gloo", "save_steps": 2, "max_steps": 4}


@pytest.fixture
def messages(tmp_path: Path) -> Callable[..., list[str]]:
    """A run, a fault of one rank → what each rank ended with."""

    def end(
        run: Run, limited: int | None = None, limit: int = 0, lost: bool = False, resume: str = "", full: str = ""
    ) -> list[str]:
        """`limited` may not write files of more than `limit` bytes; with `lost` the directory becomes a file.

        The writer of reference log-probs that `full` names finds no space on rank 0.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["faulty_runs"])
        processes = []
        for rank, environment in enumerate(environments()):
            fault = (limit if rank == limited else None, lost and rank == 0, full if rank == 0 else "")
            processes.append(context.Process(target=_outcome, args=(run, resume, environment, *fault)))
        for process in processes:
            process.start()
        for process in processes:
            process.join(90)
        waiting = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        assert not waiting, "ranks that wait for ever"
        return [run.folder.with_name(f"message-{rank}").read_text() for rank in range(2)]

    return end


def _outcome(run: Run, resume: str, environment: dict[str, object], limit: int | None, lost: bool, full: str) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.set_num_threads(1)
    if full:
        owner, _, method = full.partition(".")
        setattr(getattr(reference_cache, owner), method, _no_space)
    text = "nothing"
    try:
        trainer = run.trainer()
        if lost:
            run.folder.rmdir()
            run.folder.write_text("a file")
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        trainer.train(resume_from_checkpoint=resume or None)
    except OSError as error:
        text = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run.folder.with_name(f"message-{environment['RANK']}").write_text(text)
    torch.distributed.destroy_process_group()


def _no_space(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are those of POSIX")
@pytest.mark.parametrize(
    ("rank", "limit", "options"),
    [
        (0, 4_000, {}),
        (0, 12_000, {}),
        # With a best checkpoint, ranks wait for each other in the middle of a save.
        (0, 4_000, {"load_best_model_at_end": True, "eval_steps": 2}),
        # The state of its random numbers, which is all that it writes.
        (1, 4_000, {}),
        (0, 4_000, sharded("SHARDED_STATE_DICT")),
        (1, 4_000, sharded("SHARDED_STATE_DICT")),
    ],
    ids=["weights", "optimizer", "weights-best", "random-state-of-rank-1", "shards-of-rank-0", "shards-of-rank-1"],
)
def test_rank_that_cannot_write(
    rank: int, limit: int, options: dict[str, object], messages: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", options={**OPTIONS, **options})
    first, second = messages(run, rank, limit)
    # Under FSDP each rank looks for itself how much is free.
    assert re.sub(r"[\d,.]+ MB", "", first) == re.sub(r"[\d,.]+ MB", "", second)
    assert first.startswith(f"{run.folder / 'checkpoint-2'}: the checkpoint cannot be written (")
    assert not [*run.folder.glob("checkpoint-*")] and not (run.folder / ".incomplete").exists()


def test_directory_that_rank_0_cannot_write(messages: Callable[..., list[str]], tmp_path: Path) -> None:
    run = Run(tmp_path / "run", options=OPTIONS)
    first, second = messages(run, lost=True)
    assert first == second
    assert first.startswith(f"output_dir: expected a directory for checkpoints, got {run.folder}: ")


@pytest.mark.parametrize("writer", ["Journal.__init__", "Journal.append", "Journal.close", "ReferenceCache.save"])
def test_rank_0_without_space_for_reference_log_probs(
    writer: str, messages: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", options={**OPTIONS, "precompute_ref_log_probs": True})
    first, second = messages(run, full=writer)
    reason = f"reference log-probs of the training data cannot be written ({os.strerror(errno.ENOSPC)})"
    assert first == second == f"[Errno {errno.ENOSPC}] {reason}: '{run.folder / 'reference_cache'}'"


@pytest.mark.parametrize("name", ["rng_state_1.pth", "robust_dpo_state.pt", "scheduler.pt"])
def test_part_that_is_torn(name: str, messages: Callable[..., list[str]], tmp_path: Path) -> None:
    """Whole by its manifest, as the disk lost what it had taken."""
    run = Run(tmp_path / "run", options=OPTIONS)
    assert finish_ranks(run) == [0, 0], run.output()
    folder = run.folder / "checkpoint-2"
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    write_manifest(folder)
    rank = 1 if "1" in name else 0
    first, second = messages(run, resume=str(folder))
    assert first == second
    assert first.startswith(f"{folder} cannot be loaded on rank {rank}: ")
