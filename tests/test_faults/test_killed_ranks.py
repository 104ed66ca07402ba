"""The same on two ranks, of which one is killed."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpu_engines import zero
from faulty_runs import Run, assert_same_end, changes, finish_ranks, has_checkpoint, sharded

from robust_dpo.checkpoints import check

OPTIONS = {"ddp_backend": "gloo", "save_steps": 1}


ENGINES = {
    "ddp": OPTIONS,
    "ddp-domains": {**OPTIONS, "robust": "group_dro", "robust_options": {"step_size": 2.0}},
    "fsdp-shards": {**OPTIONS, **sharded("SHARDED_STATE_DICT")},
    "fsdp-full": {**OPTIONS, **sharded("FULL_STATE_DICT")},
    "zero-1": {**OPTIONS, **zero(1)},
    "zero-2": {**OPTIONS, **zero(2)},
    "zero-3": {**OPTIONS, **zero(3)},
}


SLOW = ("fsdp-full", "ddp-domains")
PARAMS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ENGINES]


@pytest.fixture(scope="module", params=PARAMS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed")
    run = Run(tmp_path_factory.mktemp("ranks") / "run", options=ENGINES[request.param])
    assert finish_ranks(run) == [0, 0], run.output()
    yield run


def test_checkpoint_holds_the_files_of_all_ranks(whole: Run) -> None:
    last = sorted(whole.folder.glob("checkpoint-*"))[-1]
    assert check(last)
    manifest = (last / "robust_dpo_manifest.json").read_text()
    for rank in range(2):
        assert f"rng_state_{rank}.pth" in manifest


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank(rank: int, whole: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", options=whole.options)
    place = random.randrange(changes(whole, rank))
    codes = finish_ranks(run, kill_at=(rank, place))
    assert codes[rank] == -signal.SIGKILL, f"change {place}: {run.output()}"
    assert finish_ranks(run, has_checkpoint(run)) == [0, 0], f"rank {rank} killed at change {place}: {run.output()}"
    assert_same_end(run, whole)


def test_no_rank_hangs_where_nothing_can_be_resumed(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", options=OPTIONS)
    assert all(finish_ranks(run, resume=True))
    assert "expected a checkpoint in" in run.output()
