"""Options of the microbenchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The suite imports tests by path (--import-mode=importlib), which leaves this folder off the module path.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("robust_dpo benchmarks")
    group.addoption("--vocab", type=int, default=16384, help="vocabulary of the head (default 16384)")
    group.addoption("--width", type=int, default=256, help="hidden size (default 256)")
    group.addoption("--sequences", type=int, default=4, help="sequences, two to a pair (default 4)")
    group.addoption("--tokens", type=int, default=256, help="tokens of a sequence, half of them response (default 256)")
