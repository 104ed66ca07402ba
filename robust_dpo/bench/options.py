"""What a run of the suite is asked for, and how it is checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from robust_dpo.bench.cases.base import Case
from robust_dpo.bench.implementation import Implementation
from robust_dpo.bench.machine import why_no_gpu
from robust_dpo.bench.registry import choose
from robust_dpo.checks import Interval, check_number
from robust_dpo.errors import argument_error

DEVICES = ("auto", "cpu", "cuda")
PREFLIGHT = ("tests", "sanitizer")
GPU_MINUTES, CPU_MINUTES, QUICK_MINUTES = 8.0, 5.0, 2.0


@dataclass(frozen=True)
class Options:
    """Of one run.

    Args:
        out: folder for results.json, results.md and the plots; a run of the same key goes on where it ended.
        minutes: to stop after, tables included; None for 8 on a GPU, 5 on a CPU, 2 with `quick`.
        device: "auto", "cpu" or "cuda".
        only: groups of cases, or parts of their names; empty for all.
        compare: names of implementations beside ours, or ("all",).
        quick: tiny shapes, to see that everything runs.
        preflight: whether tests and sanitizer run first on a GPU.
        checkout: whose tests those are; None for the folder that the package was imported from.
    """

    out: Path
    minutes: float | None = None
    device: str = "auto"
    only: tuple[str, ...] = ()
    compare: tuple[str, ...] = ("all",)
    quick: bool = False
    preflight: bool = True
    checkout: Path | None = None

    def resolve_device(self) -> torch.device:
        """The device to measure.

        Raises:
            ValueError: there is no such device here, or it is no GPU and a check that needs one was asked for by name.
        """
        if self.device not in DEVICES:
            raise argument_error("device", f"one of {', '.join(DEVICES)}", repr(self.device))
        why = self.why_cpu()
        if self.device == "cuda" and why is not None:
            raise argument_error("device", "auto or cpu on this machine", f"'cuda', but {why}")
        needing = [name for name in PREFLIGHT if name in self.only]
        if why is not None and needing:
            raise argument_error("only", "groups of cases on a CPU", f"{', '.join(needing)}: not run, {why}")
        return torch.device("cuda" if why is None else "cpu")

    def why_cpu(self) -> str | None:
        """Why the CPU is measured; None where a GPU is."""
        return "the CPU was asked for" if self.device == "cpu" else why_no_gpu()

    def resolve_minutes(self, device: torch.device) -> float:
        """Minutes.

        Raises:
            ValueError: they are not above 0.
        """
        if self.minutes is not None:
            return check_number("minutes", self.minutes, Interval(low=0, low_open=True))
        if self.quick:
            return QUICK_MINUTES
        return GPU_MINUTES if device.type == "cuda" else CPU_MINUTES

    def implementations(self) -> list[Implementation]:
        """Ours, and what it is compared with, as far as it can be imported.

        Raises:
            ValueError: a name is unknown, or was asked for by name and cannot be imported.
        """
        found = choose(self.compare)
        if self.compare == ("all",):
            return found
        missing = [name for name in self.compare if name not in {each.name for each in found}]
        if missing:
            raise argument_error("compare", "implementations whose package is installed", ", ".join(missing))
        ours = [each for each in choose("all") if each.ours]
        return [*ours, *(each for each in found if not each.ours)]

    def select(self, cases: list[Case]) -> list[Case]:
        """The cases asked for.

        Raises:
            ValueError: something that was asked for is neither a group nor in the name of a case.
        """
        wanted = [word for word in self.only if word not in PREFLIGHT]
        if not self.only:
            return cases
        for word in wanted:
            if not any(_matches(case, word) for case in cases):
                groups = ", ".join(dict.fromkeys([*PREFLIGHT, *(case.group for case in cases)]))
                raise argument_error("only", f"groups out of {groups}, or parts of a case's name", repr(word))
        return [case for case in cases if any(_matches(case, word) for word in wanted)]

    def wants_preflight(self, name: str) -> bool:
        return self.preflight and (not self.only or name in self.only)

    def arguments(self, minutes: float) -> list[str]:
        """The same run with other minutes, for `python -m robust_dpo.bench`."""
        found = ["--out", str(self.out), "--minutes", f"{minutes:.3f}", "--device", self.device]
        found += ["--compare", ",".join(self.compare)]
        found += ["--only", ",".join(self.only)] if self.only else []
        return found + ["--quick"] * self.quick + ["--no-preflight"] * (not self.preflight)


def _matches(case: Case, word: str) -> bool:
    return word == case.group or word in case.name
