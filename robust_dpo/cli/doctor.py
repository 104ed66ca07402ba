"""`robust-dpo doctor`: what runs here, and what to do about what does not."""

from __future__ import annotations

import os
import platform
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robust_dpo.cli.exit_codes import ExitCode
from robust_dpo.cli.findings import OPTIONAL, REQUIRED, Findings, installed, nvidia_driver_present
from robust_dpo.cli.options import Debug

if TYPE_CHECKING:
    from robust_dpo.cli.live_checks import Health
    from robust_dpo.dispatch import BackendStatus


def memory_gib() -> tuple[float, float] | None:
    """(available, total) memory of this machine in GiB where the system tells, else None."""
    names = ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")
    if not all(name in getattr(os, "sysconf_names", {}) for name in names):
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    available, total = (os.sysconf(name) * page / 2**30 for name in names)
    return available, total


def _gpu_rows() -> list[tuple[str, str]]:
    import torch

    from robust_dpo.bench.machine import describe_accelerator

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "no device is visible to it" if built else "it is built for the CPU"
        return [("gpu", f"none that torch {torch.__version__} can use: {why}")]
    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        accelerator = describe_accelerator(device)
        assert accelerator is not None
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        rows.append((f"gpu {index}", f"{accelerator.sentence}, {free:.1f} GiB free"))
    return rows


def _machine_table() -> Table:
    import torch

    from robust_dpo.bench.machine import describe_machine

    machine, memory = describe_machine(torch.get_num_threads()), memory_gib()
    grid = Table.grid(padding=(0, 2))
    rows = [
        ("python", f"{platform.python_version()} on {machine.system} ({sys.executable})"),
        ("cpu", f"{machine.cpu}; {machine.cores} cores to use, {machine.threads} torch threads"),
        ("", f"has {', '.join(machine.instructions) or 'no vector extensions that matter here'}"),
        ("memory", "unknown" if memory is None else f"{memory[0]:.1f} of {memory[1]:.1f} GiB free"),
        *_gpu_rows(),
    ]
    for name, value in rows:
        grid.add_row(Text(name, style="cyan", justify="right"), Text(value))
    return grid


def _state(status: BackendStatus, health: Health | None) -> Text:
    """Whether a backend runs, and where."""
    if health is None:
        return Text("not usable" if status.built else "not built", style="dim")
    if health.failure is not None:
        return Text("fails", style="red")
    return Text(f"on {health.device}", style="green" if health.sound else "red")


def _cell(operator: str, health: Health | None) -> Text:
    """How far an operator of a backend is from float64."""
    from robust_dpo.cli.live_checks import HEAD, TOLERANCE

    if health is None:
        return Text("·", style="dim")
    if health.failure is not None:
        return Text("?", style="red")
    if operator not in health.errors:
        return Text("by torch", style="dim")
    error = health.errors[operator]
    how = " fused" if operator == HEAD and health.fused else ""
    if error <= TOLERANCE:
        return Text(f"✓ {error:.0e}{how}", style="green")
    return Text(f"✗ off by {error:.0e}{how}", style="red")


def operator_table(found: Findings) -> Table:
    """Backends, best first, against operators."""
    from robust_dpo.cli.live_checks import CHECKS

    statuses = found.report.backends
    table = Table(title="What runs, best first; error against float64", title_justify="left", header_style="bold")
    table.add_column("")
    for status in statuses:
        table.add_column(status.name)
    table.add_row("state", *(_state(status, found.healths.get(status.name)) for status in statuses), end_section=True)
    for operator in CHECKS:
        table.add_row(operator, *(_cell(operator, found.healths.get(status.name)) for status in statuses))
    return table


def _explanations(found: Findings) -> Table:
    """One line for each backend: what it uses, or why it cannot run."""
    grid = Table.grid(padding=(0, 2))
    for status in found.report.backends:
        health = found.healths.get(status.name)
        failure = None if health is None else health.failure
        grid.add_row(Text(status.name, style="cyan"), Text(status.detail if failure is None else failure))
    return grid


def _packages() -> Table:
    """What is there in one line, what could be there in another."""
    grid = Table.grid(padding=(0, 2))
    optional = {name: installed(name) for name in OPTIONAL}
    there = {name: found for name in REQUIRED if (found := installed(name))}
    there |= {name: found for name, found in optional.items() if found}
    lines = {"installed": ", ".join(f"{name} {found}" for name, found in there.items())}
    if lacking := [f"{name} ({OPTIONAL[name]})" for name, found in optional.items() if not found]:
        lines["optional"] = f"not installed: {', '.join(lacking)}"
    for name, value in lines.items():
        grid.add_row(Text(name, style="cyan"), Text(value))
    return grid


def _look() -> Findings:
    import torch

    from robust_dpo.cli.live_checks import ask
    from robust_dpo.dispatch import backends
    from robust_dpo.probes import hidden_build

    report = backends()
    return Findings(
        report=report,
        healths=ask(status.name for status in report.backends if status.usable),
        gpu=torch.cuda.is_available(),
        torch_has_gpu_code=(torch.version.cuda or torch.version.hip) is not None,
        driver_present=nvidia_driver_present(),
        missing=tuple(name for name in REQUIRED if installed(name) is None),
        optional={name: installed(name) for name in OPTIONAL},
        hidden_build=hidden_build(),
    )


def doctor(debug: Debug = False) -> None:
    """Show what runs here, check that it computes the right numbers, and say what to do about the rest.

    Every backend that can run solves a tiny problem of each operator, which is compared with float64. The exit code is
    0 as long as one backend runs and is right.

    **Example**: `robust-dpo doctor`
    """
    console = Console()
    console.print(f"[bold]robust_dpo[/bold] {installed('robust-dpo') or 'from a source tree, not installed'}")
    if find_spec("torch") is None:
        console.print("[red]torch is missing[/red], so nothing can run: pip install torch")
        raise typer.Exit(ExitCode.FAILED)
    console.print(_machine_table())
    console.print()
    with console.status("asking every backend to solve a tiny problem"):
        found = _look()
    console.print(operator_table(found))
    console.print(_explanations(found))
    console.print()
    console.print(_packages())
    for advice in found.advice():
        console.print(Text.assemble(("→ ", "yellow"), advice))
    if not found.anything_runs:
        console.print("[red]No backend is usable[/red]: reinstall with ROBUST_DPO_BUILD=cpu to see what does not build")
        raise typer.Exit(ExitCode.FAILED)
