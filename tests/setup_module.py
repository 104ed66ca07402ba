"""What setup.py is made of, as modules, for tests of what it decides; importing them builds nothing."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


def build_module(name: str) -> ModuleType:
    """build_support.<name>."""
    with mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        return importlib.import_module(f"build_support.{name}")
