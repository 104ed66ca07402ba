"""The root of the command line."""

from __future__ import annotations

import sys

import typer

from robust_dpo.cli.bench import bench
from robust_dpo.cli.calibrate import calibrate
from robust_dpo.cli.demo import demo
from robust_dpo.cli.doctor import doctor
from robust_dpo.cli.evaluate import evaluate
from robust_dpo.cli.exit_codes import exit_code_help
from robust_dpo.cli.failures import ReportingGroup, report_internal_error
from robust_dpo.cli.report import report
from robust_dpo.cli.train import train

INTRODUCTION = """From preference data to a robustly aligned model.

Preference data that is part human and part synthetic pulls a model towards the artefacts of the synthetic part.
**calibrate** learns how much each response looks like the human target, **train** minimises the worst
case around the calibrated data, **evaluate** and **report** show what came of it. Start with
**doctor** (does everything run here?) and **demo** (the whole pipeline in a few minutes); **bench** measures
this machine."""

app = typer.Typer(
    name="robust-dpo",
    cls=ReportingGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"{INTRODUCTION}\n\n{exit_code_help()}",
)
for _command in (calibrate, train, evaluate, report, doctor, demo, bench):
    app.command()(_command)


def main() -> None:
    """Entry point of the console script and of `python -m robust_dpo`."""
    sys.excepthook = report_internal_error
    # not app(): that would put typer's own hook in the place of ours
    typer.main.get_command(app)(prog_name="robust-dpo")
