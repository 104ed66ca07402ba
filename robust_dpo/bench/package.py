"""The package that is measured: other processes must import the same one, whatever folder they start in."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import robust_dpo

# The folder that this process imported the package from: a checkout, or site-packages.
ROOT = Path(robust_dpo.__file__).resolve().parents[1]
# `python -m` searches the working directory first, and PYTHONPATH after it: in a checkout, beside an installed package,
# that would be another package than the one that started it.
_RUN_MODULE = (
    "import runpy, sys; _, root, module, *rest = sys.argv; sys.path.insert(0, root); sys.argv[1:] = rest; "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *arguments: str) -> list[str]:
    """`python -m module arguments`, with this process's package before any other."""
    return [sys.executable, "-c", _RUN_MODULE, str(ROOT), module, *arguments]


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a process that starts further ones: they find this process's package before others, too."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **(extra or {})}


def difference_from(checkout: Path) -> str | None:
    """The first source that a checkout does not share with the package in use; None where all are the same.

    None, too, where the checkout has no package of its own.
    """
    if checkout.resolve() == ROOT or not (checkout / "robust_dpo").is_dir():
        return None
    here, there = dict(_sources(ROOT)), dict(_sources(checkout))
    return next((name for name in sorted({*here, *there}) if here.get(name) != there.get(name)), None)


def _sources(root: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every Python source of the package under a folder; the kernels may be a link."""
    for folder, _, names in os.walk(root / "robust_dpo", followlinks=True):
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            yield path.relative_to(root).as_posix(), path.read_bytes()
