"""Fixtures that every test file may use."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

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
