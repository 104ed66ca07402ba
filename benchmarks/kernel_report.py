"""What the compiler makes of every Triton kernel, for chips that need not be here.

    python benchmarks/kernel_report.py --targets sm_90,gfx942 --json kernels.json

Ends with status 1 where a variant does not compile, needs more than the chip has, or is hot and spills or loads less
than 16 bytes at a time in a loop.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
SUMMARY_COLUMNS = (
    *("kernel", "target", "variants", "hot", "registers", "spilled (hot)", "shared", "loop loads (hot)", "problems"),
)
COLUMNS = (
    "kernel",
    "variant",
    "target",
    "hot",
    "warps",
    "registers",
    "spilled",
    "shared",
    "loop loads",
    "problems",
)
NUMBERS = ("variants", "hot", "warps", "registers", "spilled", "spilled (hot)", "shared")


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
        # Triton's message is an excerpt of the source; what is wrong there is in the cause.
        reasons = [f"{type(error).__name__}: {error}", *filter(None, [str(error.__cause__ or "")])]
        return Outcome(job, None, "\n".join(reasons))


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
    job, report = outcome.job, outcome.report
    if report is None:
        reason = [line.strip() for line in (outcome.error or "").splitlines() if re.search(r"\w", line)][-1]
        return [job.kernel, job.variant, job.target, *[""] * 6, f"does not compile: {reason}"]
    numbers = (report.num_warps, report.registers, report.spill_bytes, report.shared_bytes)
    return [
        *(job.kernel, job.variant, job.target, "yes" if report.hot else ""),
        *map(str, numbers),
        _widths(report.loop_loads),
        "; ".join(outcome.problems()),
    ]


def summary(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """One row per kernel and target, as in `SUMMARY_COLUMNS`."""
    grouped: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault((outcome.job.kernel, outcome.job.target), []).append(outcome)
    rows = []
    for (kernel, target), members in grouped.items():
        reports = [outcome.report for outcome in members if outcome.report]
        loads: Counter[int] = sum((Counter(each.loop_loads) for each in reports if each.hot), Counter())
        rows.append(
            [
                *(kernel, target, str(len(members)), str(sum(each.hot for each in reports))),
                _span(each.registers for each in reports),
                _span(each.spill_bytes for each in reports if each.hot),
                _span(each.shared_bytes for each in reports),
                _widths(dict(sorted(loads.items()))),
                str(sum(bool(outcome.problems()) for outcome in members) or ""),
            ]
        )
    return rows


def _widths(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{width} ×{count}" for width, count in counts.items()) or "–"


def _span(values: Iterable[int]) -> str:
    """Least and largest."""
    found = sorted(set(values))
    return "–" if not found else f"{found[0]} … {found[-1]}" if len(found) > 1 else str(found[0])


def as_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in NUMBERS else "left")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """The summary, and every variant."""
    parts = [f"Compiled by Triton {triton.__version__}; memory and widths of loads in bytes."]
    for columns, rows in ((SUMMARY_COLUMNS, summary(outcomes)), (COLUMNS, [cells(each) for each in outcomes])):
        lines = [columns, ["---"] * len(columns), *rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, ""])


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
    defaults = ",".join(DEFAULT_TARGETS)
    parser.add_argument("--targets", default=defaults, help=f"of {', '.join(TARGETS)} (default: {defaults})")
    parser.add_argument(
        "--module",
        action="append",
        help="instead of the package's, compile the kernels of this importable module, listed by its aot_variants()",
    )
    parser.add_argument("--sample", type=int, help="compile this many variants of each kernel, not all")
    parser.add_argument("--all", action="store_true", help="print every variant, not only those with problems")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    options = parser.parse_args(arguments)
    options.targets = options.targets.split(",")
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"--targets: expected some of {', '.join(TARGETS)}, got {', '.join(unknown)}")
    for module in options.module or ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            where = f"installed, on PYTHONPATH or in {Path(__file__).parent}"
            parser.error(f"--module: expected a module {where}, got {module}: {error}")
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
    failed = [outcome for outcome in outcomes if outcome.problems()]
    console.print(as_table(f"Triton {triton.__version__}", SUMMARY_COLUMNS, summary(outcomes)))
    if shown := outcomes if options.all else failed:
        console.print(as_table("Variants" if options.all else "Problems", COLUMNS, map(cells, shown)))
    if options.json:
        options.json.write_text(as_json(outcomes), encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(as_markdown(outcomes), encoding="utf-8")
    console.print(f"{len(outcomes)} variants compiled, {len(failed)} with problems", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
