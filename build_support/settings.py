"""What the environment asks of a build; setup.py has the words for people."""

from __future__ import annotations

import itertools
import os
import re
import shlex

from setuptools.errors import BaseError

MODES = ("auto", "cpu", "cuda", "none")


def build_mode() -> str:
    mode = os.environ.get("ROBUST_DPO_BUILD", "auto")
    if mode not in MODES:
        raise BaseError(f"ROBUST_DPO_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def wanted_archs() -> tuple[str, ...] | None:
    """What ROBUST_DPO_CUDA_ARCHS asks for, None where it is not set."""
    text = os.environ.get("ROBUST_DPO_CUDA_ARCHS", "")
    names = [name for name in re.split(r"[;,\s]+", text) if name]
    if not names:
        return None
    archs = [name.removeprefix("sm_").removesuffix("+PTX").replace(".", "") for name in names]
    if not all(name.isdecimal() and int(name) >= 80 for name in archs):
        raise BaseError(f'ROBUST_DPO_CUDA_ARCHS: expected numbers from 80 on, such as "80;90", got {text!r}')
    return tuple(sorted(set(archs), key=int))


def host_compiler() -> str | None:
    """The C++ compiler of CXX, which may stand behind a launcher and before flags, such as "ccache g++ -pthread"."""
    words = itertools.takewhile(lambda word: not word.startswith("-"), shlex.split(os.environ.get("CXX", "")))
    return next(iter([*words][::-1]), None)
