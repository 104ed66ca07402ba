"""Forward + backward of DPO over an LM head on this CPU: every implementation against the floor, in one run.

    python benchmarks/head_cpu.py --dtype fp32,bf16 --rounds 5 --threads 4 --out benchmarks/results

Writes head_cpu.json and head_cpu.md to --out; --docs puts the same table between the markers of a Markdown file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from headbench.machine import describe_machine
from headbench.peers import IMPLEMENTATIONS, choose
from headbench.problem import Shape, shape_dict
from headbench.report import markdown, replace_between, rich_table
from headbench.session import measure
from rich.console import Console

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MARKER = "head_cpu"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def _dtypes(text: str) -> list[torch.dtype]:
    names = text.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise argparse.ArgumentTypeError(f"expected names out of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    return [DTYPES[name] for name in names]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dtype", type=_dtypes, default="fp32,bf16", help="comma-separated: fp32, bf16 (default both)")
    parser.add_argument("--rounds", type=_positive, default=5, help="timed steps of each implementation (default 5)")
    parser.add_argument(
        "--threads", type=_positive, default=torch.get_num_threads(), help="of every process (default %(default)s)"
    )
    parser.add_argument("--only", default="all", help=f"comma-separated: {', '.join(IMPLEMENTATIONS)} (default all)")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for JSON and Markdown")
    parser.add_argument("--docs", type=Path, help=f"Markdown file with {MARKER} markers to update")
    for size in fields(Shape):
        parser.add_argument(f"--{size.name}", type=_positive, default=size.default, help="default %(default)s")
    options = parser.parse_args(arguments)
    if options.sequences % 2:
        parser.error(f"--sequences: expected an even number (pairs), got {options.sequences}")
    if options.tokens < 2:
        parser.error(f"--tokens: expected at least 2 (half are response), got {options.tokens}")
    try:
        options.names = {dtype: choose(options.only, dtype) for dtype in options.dtype}
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit code is 1 if an implementation failed."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    shape = Shape(**{size.name: getattr(options, size.name) for size in fields(Shape)})
    machine = describe_machine(options.threads)
    sections = []
    with tempfile.TemporaryDirectory(prefix="headbench-") as folder:
        for dtype in options.dtype:
            section = measure(
                options.names[dtype],
                shape,
                dtype,
                rounds=options.rounds,
                threads=options.threads,
                seed=options.seed,
                folder=Path(folder),
                memory=not options.no_memory,
                console=console,
            )
            console.print(rich_table(section))
            sections.append(section)
    text = markdown(machine, shape_dict(shape), options.rounds, sections)
    record = {
        "machine": asdict(machine),
        "shape": shape_dict(shape),
        "rounds": options.rounds,
        "seed": options.seed,
        "sections": [section.as_dict() for section in sections],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "head_cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "head_cpu.md").write_text(text)
    if options.docs:
        replace_between(options.docs, MARKER, text)
    console.print(f"written: {options.out / 'head_cpu.json'}, {options.out / 'head_cpu.md'}", soft_wrap=True)
    return int(any(row.failure for section in sections for row in section.rows))


if __name__ == "__main__":
    sys.exit(main())
