"""What the compiler makes of every Triton kernel, for chips that need not be here.

    python benchmarks/kernel_report.py --targets sm_90,gfx942 --json kernels.json

Ends with status 1 where a variant does not compile, needs more than the chip has, or is hot and spills or loads less
than 16 bytes at a time in a loop.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

# Triton reads it when it is imported; interpreted functions cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from rich.console import Console
from rich.table import Table
from triton.errors import TritonError

from robust_dpo.kernels.triton_aot import (
    TARGETS,
    CompileReport,
    Variant,
    compile_variant,
    kernel_modules,
    variants_of,
)

DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
COLUMNS = (
    "kernel",
    "variant",
    "target",
    "hot",
    "warps",
    "registers",
    "spilled B",
    "shared B",
    "loop loads B",
    "problems",
)


@dataclass(frozen=True)
class Job:
    """One variant for one target; by name, because kernels do not travel between processes.

    Args:
        module: that lists the variant.
        variant: its name.
        kernel: name of its function.
        target: name of the chip.
    """

    module: str
    variant: str
    kernel: str
    target: str


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a report, or the reason why there is none."""

    job: Job
    report: CompileReport | None
    error: str | None = None

    def problems(self) -> list[str]:
        return self.report.problems() if self.report else [f"does not compile: {self.error}"]


@functools.cache
def _variants(module: str) -> dict[str, Variant]:
    return {variant.name: variant for variant in variants_of(module)}


def plan(modules: Sequence[str], targets: Sequence[str], sample: int | None) -> list[Job]:
    """Every variant for every target, or of every kernel `sample` ones, evenly spread over its list."""
    jobs = []
    for module in modules:
        by_kernel: dict[str, list[str]] = {}
        for variant in _variants(module).values():
            by_kernel.setdefault(variant.kernel.__name__, []).append(variant.name)
        for kernel, names in by_kernel.items():
            count = len(names) if sample is None else min(sample, len(names))
            chosen = [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]
            jobs += [Job(module, name, kernel, target) for target in targets for name in chosen]
    return jobs


def run_job(job: Job) -> Outcome:
    """Compile one variant; what the compiler refuses is an outcome, too."""
    try:
        return Outcome(job, compile_variant(_variants(job.module)[job.variant], TARGETS[job.target]))
    except (TritonError, RuntimeError, ValueError) as error:
        return Outcome(job, None, f"{type(error).__name__}: {error}")


def run_all(jobs: Sequence[Job], processes: int) -> Iterator[Outcome]:
    """Outcomes in the order of the jobs; a compiler that crashes takes its own job with it and no other."""
    with _pool(processes) as pool:
        futures = [pool.submit(run_job, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield _run_alone(job)


def _run_alone(job: Job) -> Outcome:
    with _pool(1) as pool:
        future: Future[Outcome] = pool.submit(run_job, job)
        try:
            return future.result()
        except BrokenProcessPool:
            return Outcome(job, None, "the compiler crashed")


def _pool(processes: int) -> ProcessPoolExecutor:
    # A fresh interpreter for each: torch's threads do not survive a fork.
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def cells(outcome: Outcome) -> list[str]:
    """The row of one outcome, as in `COLUMNS`; spilled and shared memory and the widths of loads in bytes."""
    job, report, problems = outcome.job, outcome.report, "; ".join(outcome.problems())
    if report is None:  # the reason is in the last line, below an excerpt of the source
        return [job.kernel, job.variant, job.target, *[""] * 6, f"does not compile: {problems.splitlines()[-1]}"]
    loads = ", ".join(f"{width} ×{count}" for width, count in report.loop_loads.items()) or "–"
    numbers = (report.num_warps, report.registers, report.spill_bytes, report.shared_bytes)
    return [job.kernel, job.variant, job.target, "yes" if report.hot else "", *map(str, numbers), loads, problems]


def as_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title=f"Triton {triton.__version__}", title_justify="left", header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in COLUMNS[4:8] else "left")
    for outcome in outcomes:
        table.add_row(*cells(outcome), style="red" if outcome.problems() else None)
    return table


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(outcome) for outcome in outcomes)]
    return "\n".join([f"Triton {triton.__version__}", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def as_json(outcomes: Sequence[Outcome]) -> str:
    rows = [
        asdict(outcome.job)
        | {"report": asdict(outcome.report) if outcome.report else None}
        | {"error": outcome.error, "problems": outcome.problems()}
        for outcome in outcomes
    ]
    versions = {"triton": triton.__version__, "python": platform.python_version()}
    return json.dumps(versions | {"variants": rows}, indent=1)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(DEFAULT_TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--module", action="append", help="read the variants of this module instead of the package's")
    parser.add_argument("--sample", type=int, help="compile this many variants of each kernel, not all")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    options = parser.parse_args(arguments)
    options.targets = options.targets.split(",")
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"--targets: expected some of {', '.join(TARGETS)}, got {', '.join(unknown)}")
    for name in ("sample", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, write; the exit status."""
    options = _parse(arguments)
    jobs = plan(options.module or kernel_modules(), options.targets, options.sample)
    outcomes = list(run_all(jobs, options.jobs))
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(as_table(outcomes))
    if options.json:
        options.json.write_text(as_json(outcomes), encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(as_markdown(outcomes), encoding="utf-8")
    failed = [outcome for outcome in outcomes if outcome.problems()]
    console.print(f"{len(outcomes)} variants compiled, {len(failed)} with problems", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
