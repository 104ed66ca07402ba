"""The command line of the CPU comparison."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from robust_dpo.bench.machine import describe_machine
from robust_dpo.bench.problem import Shape, shape_dict
from robust_dpo.bench.processes.session import measure
from robust_dpo.bench.registry import IMPLEMENTATIONS, choose
from robust_dpo.bench.tables import head_markdown, replace_between, rich_table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MARKER = "head_cpu"
SIZES = {"vocab": Shape.vocab, "width": Shape.width, "sequences": Shape.sequences, "tokens": Shape.tokens}


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


def parse(arguments: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
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
    for size, default in SIZES.items():
        parser.add_argument(f"--{size}", type=_positive, default=default, help="default %(default)s")
    options = parser.parse_args(arguments)
    if options.sequences % 2:
        parser.error(f"--sequences: expected an even number (pairs), got {options.sequences}")
    if options.tokens < 2:
        parser.error(f"--tokens: expected at least 2 (half are response), got {options.tokens}")
    try:
        chosen = [each for each in choose(options.only) if "cpu" in each.devices]
    except ValueError as error:
        parser.error(str(error))
    options.implementations = {dtype: [each for each in chosen if dtype in each.dtypes] for dtype in options.dtype}
    return options


def main(arguments: Sequence[str] | None = None, description: str | None = None) -> int:
    """Run; the exit code is 1 if an implementation failed."""
    options = parse(arguments, description)
    console = Console(width=None if sys.stdout.isatty() else 160)
    shape = Shape(**{size: getattr(options, size) for size in SIZES})
    machine = describe_machine(options.threads)
    records = []
    with tempfile.TemporaryDirectory(prefix="robust-dpo-bench-") as folder:
        for dtype in options.dtype:
            record = measure(
                options.implementations[dtype],
                shape,
                dtype,
                rounds=options.rounds,
                threads=options.threads,
                seed=options.seed,
                folder=Path(folder),
                memory=not options.no_memory,
                console=console,
            )
            console.print(rich_table(record))
            records.append(record)
    text = head_markdown(machine, shape_dict(shape), options.rounds, records)
    content = {
        "machine": machine.as_dict(),
        "shape": shape_dict(shape),
        "rounds": options.rounds,
        "seed": options.seed,
        "records": [record.as_dict() for record in records],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "head_cpu.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.out / "head_cpu.md").write_text(text)
    if options.docs:
        replace_between(options.docs, MARKER, text)
    console.print(f"wrote: {options.out / 'head_cpu.json'}, {options.out / 'head_cpu.md'}", soft_wrap=True)
    return int(any(row.failure for record in records for row in record.rows))
