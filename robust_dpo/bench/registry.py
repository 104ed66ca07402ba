"""The registry of implementations with everything in it that this package knows."""

from __future__ import annotations

from robust_dpo.bench import ours, peers  # noqa: F401  they register themselves
from robust_dpo.bench.implementation import IMPLEMENTATIONS, choose

__all__ = ["IMPLEMENTATIONS", "choose"]
