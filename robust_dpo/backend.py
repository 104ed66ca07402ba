"""What a backend is: its status on this machine, what it implements, and where."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from robust_dpo.errors import argument_error, type_error

ROW_LOGPROB = "row_logprob"
GROUP_EPILOGUE = "group_epilogue"
CALIBRATION_WEIGHTS = "calibration_weights"
RESCALE = "rescale"
FUSED_HEAD = "fused_head"
OPERATORS = (ROW_LOGPROB, GROUP_EPILOGUE, RESCALE, CALIBRATION_WEIGHTS, FUSED_HEAD)
FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


@dataclass(frozen=True)
class BackendStatus:
    """One backend on this machine.

    Args:
        name: the value of `backend=`.
        built: whether its code is there.
        usable: whether it can run here.
        detail: what is in use (instruction set, versions), or why it cannot run.
    """

    name: str
    built: bool
    usable: bool
    detail: str

    def __str__(self) -> str:
        state = "usable" if self.usable else "built, not usable" if self.built else "not built"
        return f"{self.name:<7}{state:<19}{self.detail}"


@dataclass(frozen=True)
class BackendReport:
    """All backends, best first for `auto`, and the versions that matter; prints as one line for each."""

    backends: tuple[BackendStatus, ...]
    versions: Mapping[str, str]

    def __getitem__(self, name: str) -> BackendStatus:
        for status in self.backends:
            if status.name == name:
                return status
        raise KeyError(f"expected one of {', '.join(sorted(each.name for each in self.backends))}, got {name!r}")

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n".join([*map(str, self.backends), f"{'':<7}{versions}"])

    __repr__ = __str__


@dataclass(frozen=True)
class Backend:
    """How a backend is found; docs/kernels.md has a complete one.

    Args:
        name: the value of `backend=`.
        probe: its status here, under the same name; called once. One that raises makes the backend unusable.
        launchers: operator -> "module:function", imported when first used. Operators are "row_logprob" (needed to be
            chosen), "group_epilogue" (whose module also has `supports(loss, widest)`), "rescale" and
            "calibration_weights"; plain PyTorch stands in for those that are missing. "fused_head" names the function
            that says why the package's own native head cannot run for a dtype, or None.
        device_types: where it runs, such as `frozenset({"cuda"})`; None for everywhere.
        dtypes: of the tiles that it takes.
        priority: `auto` takes the usable backend of the highest priority. Those of the package: triton 20, cuda 15,
            cpu 10, torch 0.

    Raises:
        TypeError, ValueError: a field is not as described; the message names the backend.
    """

    name: str
    probe: Callable[[], BackendStatus]
    launchers: Mapping[str, str] = field(default_factory=dict)
    device_types: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] = FLOATS
    priority: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise type_error("name", "the name of the backend", self.name)
        if self.name in ("", "auto"):
            raise argument_error("name", "a name, and not 'auto', which stands for the best backend", repr(self.name))
        if not callable(self.probe):
            raise type_error(f"probe of backend {self.name!r}", "a function () -> BackendStatus", self.probe)
        for operator, launcher in self.launchers.items():
            self._check_launcher(operator, launcher)
        for name, kinds, kind in (("device_types", self.device_types, str), ("dtypes", self.dtypes, torch.dtype)):
            if kinds is not None and not (
                isinstance(kinds, frozenset) and all(isinstance(each, kind) for each in kinds)
            ):
                raise argument_error(f"{name} of backend {self.name!r}", f"a frozenset of {kind.__name__}", repr(kinds))
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise type_error(f"priority of backend {self.name!r}", "a whole number", self.priority)

    def _check_launcher(self, operator: str, launcher: object) -> None:
        owner = f"launchers of backend {self.name!r}"
        if operator not in OPERATORS:
            raise argument_error(owner, f"operators among {', '.join(OPERATORS)}", repr(operator))
        if not isinstance(launcher, str):
            raise type_error(owner, f'"module:function" for {operator}', launcher)
        if not re.fullmatch(r"[\w.]+:\w+", launcher):
            raise argument_error(owner, f'"module:function" for {operator}', repr(launcher))

    def unsupported(self, operator: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
        """Why it has no code for `operator` on tiles of `dtype` (None: of some dtype) on `device`; None if it has."""
        if operator not in self.launchers:
            return f"it does not implement {operator}"
        if self.device_types is not None and device.type not in self.device_types:
            return f"it runs on {', '.join(sorted(self.device_types))}, not on {device.type}"
        if dtype is not None and dtype not in self.dtypes:
            return f"it does not take {dtype}"
        return None
