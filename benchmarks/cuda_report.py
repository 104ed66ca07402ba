"""What the compiler made of every CUDA kernel, for all chips that the extension holds code for; needs no GPU.

    python benchmarks/cuda_report.py --json cuda.json

Ends with status 1 where a hot kernel spills, or loads less than 16 bytes at a time in a loop.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from robust_dpo.dispatch import backends
from robust_dpo.kernels.cuda_assembly import KernelReport, reports_of


def table_of(reports: list[KernelReport]) -> Table:
    """One line for each kernel and chip."""
    table = Table(title="CUDA kernels as compiled", title_justify="left")
    for column in ("kernel", "chip", "hot", "registers", "spilled", "loop loads", "problems"):
        table.add_column(column, justify="right" if column in ("registers", "spilled") else "left")
    for report in reports:
        cells = (
            str(report.registers),
            str(report.local_bytes),
            _widths(report.loop_loads),
            "; ".join(report.problems()),
        )
        table.add_row(report.kernel, report.chip, "hot" if report.hot else "", *cells)
    return table


def _widths(loads: Mapping[int, int]) -> str:
    return ", ".join(f"{count} × {width} B" for width, count in sorted(loads.items()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the reports there")
    options = parser.parse_args(arguments)
    spec = importlib.util.find_spec("robust_dpo._cuda")
    if spec is None or spec.origin is None:
        print(f"the CUDA extension is not built: {backends()['cuda'].detail}", file=sys.stderr)
        return 2
    reports = sorted(reports_of(Path(spec.origin)), key=lambda report: (report.kernel, report.chip))
    Console(width=None if sys.stdout.isatty() else 200).print(table_of(reports))
    if options.json is not None:
        content = [asdict(report) | {"hot": report.hot, "problems": report.problems()} for report in reports]
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(report.problems() for report in reports))


if __name__ == "__main__":
    sys.exit(main())
