"""Fixtures that every test file may use."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Triton reads it when it is imported, so before anything else does: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Shared machines stall for longer than hypothesis' deadline of 200 ms; a slow example is no failure.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of oracles and real data beside the checkout; tests that need it are skipped where it is absent."""
    shared = Path(__file__).resolve().parents[2] / "shared"
    if not shared.is_dir():
        pytest.skip(f"needs the shared oracles and data in {shared}, which are not here")
    return shared


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For many tiny operators: where cores are shared, a barrier of two threads takes longer than their work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["host", "device"])
def logits_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How `sequence_logps_from_logits` finds its rows: by reading the targets on the host, or as on a GPU, without."""
    if request.param == "device":
        module = importlib.import_module("robust_dpo.ops.logits_logps")
        monkeypatch.setattr(module, "takes_all_rows", lambda device: True)
    return request.param
