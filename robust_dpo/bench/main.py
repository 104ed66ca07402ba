"""From options to files: runs the suite, writes results.md and the plots; shared by every front end."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from robust_dpo.bench.options import CPU_MINUTES, DEVICES, GPU_MINUTES, Options
from robust_dpo.bench.plots import draw
from robust_dpo.bench.report import headline, results_markdown
from robust_dpo.bench.store import Store
from robust_dpo.bench.suite import Log, Result, go_on_elsewhere, run_suite
from robust_dpo.bench.workbench import DeviceLost
from robust_dpo.errors import DataError

USAGE_ERROR = 2


@dataclass(frozen=True)
class Written:
    """What a run left in its folder.

    Args:
        result: everything measured, or None where another process went on and reported.
        paths: files.
        exit_code: 0, or 1 where a check or something of ours failed.
    """

    result: Result | None
    paths: list[Path]
    exit_code: int


def run_and_write(options: Options, log: Log) -> Written:
    """One run of the suite with its files; errors as in `run_suite`, but a lost device is survived."""
    started = time.monotonic()
    try:
        result = run_suite(options, log)
    except DeviceLost as lost:
        log(f"the device is lost: {lost}; going on in a new process")
        minutes = options.resolve_minutes(options.resolve_device()) - (time.monotonic() - started) / 60
        return Written(None, [], go_on_elsewhere(options, max(minutes, 0.1)))
    return Written(result, write(result.store, options.out), int(result.failed))


def write(store: Store, out: Path) -> list[Path]:
    """results.md and the plots of what is in the store; returns all files of the run."""
    page = out / "results.md"
    page.write_text(results_markdown(store), encoding="utf-8")
    return [store.path, page, *draw(store.records, out)]


def words(text: str) -> tuple[str, ...]:
    """Comma-separated, without empty ones."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse(
    arguments: Sequence[str] | None = None, description: str | None = None, checkout: Path | None = None
) -> Options:
    """Options from a command line; `checkout` as in `Options`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder; called again with the same, the run goes on")
    parser.add_argument(
        "--minutes", type=float, help=f"to stop after (default {GPU_MINUTES:g} on a GPU, {CPU_MINUTES:g} on a CPU)"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--only", type=words, default=(), help="comma-separated groups, or parts of the names of cases")
    parser.add_argument(
        "--compare", type=words, default=("all",), help="comma-separated implementations (default: all importable)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--no-preflight", action="store_true", help="no tests and no sanitizer before measuring")
    found = parser.parse_args(arguments)
    return Options(
        found.out, found.minutes, found.device, found.only, found.compare, found.quick, not found.no_preflight, checkout
    )


def main(arguments: Sequence[str] | None = None, description: str | None = None, checkout: Path | None = None) -> int:
    """The suite as a script; the exit code is 1 if a check or something of ours failed, 2 for a wrong argument."""
    options = parse(arguments, description, checkout)
    console = Console(highlight=False, soft_wrap=True)

    def log(line: str) -> None:
        console.print(line, markup=False)

    try:
        written = run_and_write(options, log)
    except (ValueError, DataError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        return USAGE_ERROR
    if written.result is not None:
        for line in headline(written.result.store.records):
            peer = f"; the fastest peer takes {line.peer} × as long" if line.peer else ""
            log(f"{line.case}: {line.milliseconds} ms, {line.floor} × floor{peer}")
    for path in written.paths:
        log(f"wrote: {path}")
    return written.exit_code
