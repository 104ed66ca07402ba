"""`robust-dpo doctor`: what runs here, and what to do about what does not."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from robust_dpo.cli.exit_codes import ExitCode
from robust_dpo.cli.options import Debug

if TYPE_CHECKING:
    from robust_dpo.dispatch import BackendReport

REQUIRED = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "scikit-learn",
    "matplotlib",
    "rich",
    "typer",
    "numpy",
)
OPTIONAL = {
    "triton": "GPU kernels; comes with torch for CUDA on Linux",
    "flash-attn": "pip install 'robust-dpo\\[flash]' for packed attention on GPU",
    "trl": "only a peer in benchmarks: pip install 'robust-dpo\\[bench]'",
    "liger-kernel": "only a peer in benchmarks: pip install 'robust-dpo\\[bench]'",
    "cut-cross-entropy": "only a peer in benchmarks: pip install 'robust-dpo\\[bench]'",
}


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def memory_gib() -> tuple[float, float] | None:
    """(available, total) memory of this machine in GiB where the system tells, else None."""
    names = ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")
    if not all(name in getattr(os, "sysconf_names", {}) for name in names):
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    available, total = (os.sysconf(name) * page / 2**30 for name in names)
    return available, total


def _machine_rows() -> list[tuple[str, str]]:
    import torch

    memory = memory_gib()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", f"{platform.system()} {platform.machine()}"),
        (
            "cpu",
            f"{cpus} usable cores, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}",
        ),
        ("memory", "unknown" if memory is None else f"{memory[0]:.1f} of {memory[1]:.1f} GiB free"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            state = f"{properties.name}, sm_{properties.major}{properties.minor}"
            rows.append((f"gpu {index}", f"{state}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"))
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        rows.append(("gpu", f"none: {why}"))
    return rows


def _versions_table() -> Table:
    table = Table(title="Packages", title_justify="left", title_style="bold", header_style="bold")
    for column in ("package", "version", "note"):
        table.add_column(column)
    for name in REQUIRED:
        found = installed(name)
        table.add_row(name, found or "[red]missing[/red]", "" if found else f"pip install {name}")
    for name, use in OPTIONAL.items():
        found = installed(name)
        table.add_row(name, found or "[dim]not installed[/dim]", "" if found else f"[dim]optional: {use}[/dim]")
    return table


def _advice(report: BackendReport) -> list[str]:
    """What would make this machine faster."""
    import torch

    found = {status.name: status for status in report.backends}
    advice = []
    if "cpu" in found and not found["cpu"].built:
        advice.append("native CPU kernels: install g++, then reinstall with ROBUST_DPO_BUILD=cpu (fails loudly)")
    if not torch.cuda.is_available() and torch.version.cuda is not None:
        advice.append("torch can use CUDA but sees no GPU: check `nvidia-smi` and CUDA_VISIBLE_DEVICES")
    return advice


def doctor(debug: Debug = False) -> None:
    """Show what runs here: backends, versions, threads, memory, GPU, and what to do about what is missing.

    The exit code is 0 as long as one backend can run.

    **Example**: `robust-dpo doctor`
    """
    console = Console()
    console.print(f"[bold]robust_dpo[/bold] {installed('robust-dpo') or 'from a source tree, not installed'}")
    if find_spec("torch") is None:
        console.print("[red]torch is missing[/red], so nothing can run: pip install torch")
        raise typer.Exit(ExitCode.FAILED)
    for name, value in _machine_rows():
        console.print(f"{name:>8}  {value}", highlight=False, soft_wrap=True)
    console.print()
    from robust_dpo.dispatch import backends

    report = backends()
    console.print("[bold]Backends[/bold], best first")
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    console.print()
    console.print(_versions_table())
    if not any(status.usable for status in report.backends):
        console.print(
            "[red]No backend is usable[/red]: reinstall with ROBUST_DPO_BUILD=cpu to see why it does not build"
        )
        raise typer.Exit(ExitCode.FAILED)
    for advice in _advice(report):
        console.print(f"[yellow]→[/yellow] {advice}", highlight=False)
