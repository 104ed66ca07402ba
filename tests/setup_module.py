"""setup.py as a module, for tests of what it decides; importing it builds nothing."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

PATH = Path(__file__).resolve().parents[1] / "setup.py"


@functools.cache
def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("robust_dpo_setup", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    with mock.patch("setuptools.setup"), mock.patch.dict("os.environ", {"ROBUST_DPO_BUILD": "none"}):
        spec.loader.exec_module(module)
    return module
