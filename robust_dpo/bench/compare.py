"""Candidates side by side: each is opened, checked, and its memory taken; those that are right are timed in turns."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from robust_dpo.bench.budget import OutOfTime
from robust_dpo.bench.memory import extra_bytes
from robust_dpo.bench.record import Row
from robust_dpo.bench.timing import Run, in_turns
from robust_dpo.bench.workbench import DeviceLost, Workbench

OUT_OF_TIME = "not measured: out of time"


@dataclass(frozen=True)
class Opened:
    """A candidate that has run once.

    Args:
        run: what to time.
        errors: relative error of each of its results.
    """

    run: Run
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Candidate:
    """Something to compare.

    Args:
        row: where its measurements go.
        open: sets it up, runs it once and compares its results; whatever it raises becomes the row's failure.
        limits: largest error of each result that is right; a wrong candidate is not timed.
        takes_memory: whether its memory is of interest.
    """

    row: Row
    open: Callable[[], Opened]
    limits: Mapping[str, float]
    takes_memory: bool = True


def foreign_failures() -> tuple[type[Exception], ...]:
    """What code of others raises when it cannot run: errors of Python and torch, and of compilers that are loaded."""
    known = [RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError, LookupError, OSError]
    compilers = {"triton.errors": "TritonError", "cutlass.base_dsl.common": "DSLBaseError"}
    found = [getattr(sys.modules.get(module), name, None) for module, name in compilers.items()]
    return (*known, ArithmeticError, *(each for each in found if each is not None))


def first_line(error: Exception) -> str:
    """Type and first line of an error, for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def wrong_results(errors: Mapping[str, float], limits: Mapping[str, float]) -> str | None:
    """What is wrong, or None; a NaN is never right."""
    wrong = [f"{name} off by {error:.1e}" for name, error in errors.items() if not error <= limits[name]]
    return None if not wrong else f"wrong: {', '.join(wrong)}; the limit is {max(limits.values()):.0e}"


def compare(candidates: Sequence[Candidate], bench: Workbench, case: str, *, rounds: int, warmups: int = 1) -> bool:
    """Fill in the rows of all candidates; whether there was time for all of them.

    Where an alarm ends it, what was measured until then is kept.

    Raises:
        DeviceLost: a candidate left the device unusable; nothing can be measured in this process any more.
    """
    runs: dict[str, Run] = {}
    seconds: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    complete = True
    try:
        for candidate in candidates:
            row = candidate.row
            if bench.remaining <= 0:
                complete = False
                continue
            row.failure = bench.crashes.get((case, row.name))
            if row.failure is None:
                _open(candidate, bench, case, runs)
        if runs:
            bench.announce(case, "rounds")
            tolerant = {name: _tolerant(name, run, failures) for name, run in runs.items()}
            enough = time.monotonic() + bench.patience
            in_turns(
                tolerant,
                bench.stopwatch,
                rounds=rounds,
                enough=enough,
                deadline=bench.deadline,
                warmups=warmups,
                seconds=seconds,
            )
    except OutOfTime:
        complete = False
    for row in (candidate.row for candidate in candidates):
        if row.name in failures:
            row.failure = failures[row.name]
            bench.log(f"{case}: {row.name} failed: {row.failure}")
            _check_device(bench, case, row)
        row.seconds = [] if row.failure else seconds.get(row.name, [])
        if not complete and not row.seconds and row.failure is None:
            row.failure = OUT_OF_TIME
    return complete


def _tolerant(name: str, run: Run, failures: dict[str, str]) -> Run:
    """The same run, which from its first failure on does nothing: out of memory beside the others, for instance."""

    def call() -> None:
        if name in failures:
            return
        try:
            run.call()
        except foreign_failures() as error:
            failures[name] = first_line(error)

    return Run(call, run.prepare, run.finish)


def _open(candidate: Candidate, bench: Workbench, case: str, runs: dict[str, Run]) -> None:
    row = candidate.row
    bench.announce(case, row.name)
    try:
        started = time.perf_counter()
        opened = candidate.open()
        bench.synchronize()
        row.first_seconds = time.perf_counter() - started
        row.errors = dict(opened.errors)
        row.failure = wrong_results(row.errors, candidate.limits)
        if row.failure is None:
            if candidate.takes_memory:
                _take_memory(row, opened.run, bench)
            runs[row.name] = opened.run
    except foreign_failures() as error:
        row.failure = first_line(error)
        bench.log(f"{case}: {row.name} failed: {row.failure}")
    if row.failure is not None:
        _check_device(bench, case, row)
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _take_memory(row: Row, run: Run, bench: Workbench) -> None:
    if run.prepare is not None:
        run.prepare()
    taken = extra_bytes(run.call, bench.device)
    if run.finish is not None:
        run.finish()
    if taken is not None:
        row.extra_bytes, row.memory_method = taken


def _check_device(bench: Workbench, case: str, row: Row) -> None:
    """An illegal access leaves every later call of the process failing."""
    try:
        torch.ones(1, device=bench.device).sum().item()
    except RuntimeError as error:
        raise DeviceLost(case, row.name, row.failure or first_line(error)) from error
