"""Runs that are compared with one that nothing happened to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_runs import Run, finish


@pytest.fixture(scope="session", autouse=True)
def _importable() -> None:
    """The server that forks the runs imports their module once, from where the tests found it."""
    here = Path(__file__).parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """model, options → a finished run with them; made once."""
    finished: dict[str, Run] = {}

    def get(model: str = "dropout", **options: Any) -> Run:
        key = repr((model, options))
        if key not in finished:
            run = Run(tmp_path_factory.mktemp("whole") / "run", model, options)
            assert finish(run) == 0, run.output()
            finished[key] = run
        return finished[key]

    return get
