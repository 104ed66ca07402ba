"""Errors become one readable line and a documented exit code; the traceback is for `--debug`."""

from __future__ import annotations

import sys
import traceback
from types import TracebackType
from typing import Any

import typer
from typer.core import TyperGroup

from robust_dpo.cli.exit_codes import ExitCode
from robust_dpo.errors import DataError

_DEBUG = "robust_dpo.debug"
# The base class of every error of a command line. Typer has no public name for it: click's, or typer's own copy.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class ModelError(RuntimeError):
    """A model or tokenizer cannot be loaded."""


def _raised_by_us(error: BaseException) -> bool:
    """Whether the innermost frame is ours.

    A ValueError of this package is an argument that a user can correct, one from a library below is a failed run.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("robust_dpo")


def exit_code_of(error: Exception) -> ExitCode | None:
    """The exit code of an error that a user can act on; None for an internal one."""
    if isinstance(error, (DataError, FileNotFoundError)):
        return ExitCode.DATA
    if isinstance(error, ModelError):
        return ExitCode.MODEL
    if isinstance(error, FileExistsError):
        return ExitCode.EXISTS
    if isinstance(error, (ValueError, TypeError)) and _raised_by_us(error):
        return ExitCode.USAGE
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class ReportingGroup(TyperGroup):
    """The root command: turns errors that a user can act on into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            typer.echo("\nrobust-dpo: interrupted; a training run goes on with --resume", err=True)
            raise typer.Exit(ExitCode.INTERRUPTED) from interrupt
        except _UsageError as error:
            message = error.format_message() if isinstance(error, typer.BadParameter) else str(error)
            # Pydantic's words, which typer passes on from its own checks of choices.
            message = message.replace("Value error, ", "")
            command = getattr(getattr(error, "ctx", None), "command_path", "robust-dpo")
            typer.echo(f"robust-dpo: error: {' '.join(message.split())} (see {command} --help)", err=True)
            raise typer.Exit(ExitCode.USAGE) from error
        except (ValueError, TypeError, OSError, ModelError) as error:
            code = exit_code_of(error)
            if code is None:
                raise
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            typer.echo(f"robust-dpo: error: {_one_line(error)}", err=True)
            raise typer.Exit(code) from error


def report_internal_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook: one line instead of a traceback. Python itself then exits with code 1, `ExitCode.FAILED`."""
    typer.echo(f"robust-dpo: failed: {kind.__name__}: {_one_line(error)}", err=True)
    typer.echo("Run the same command with --debug for the traceback.", err=True)


def enable_debug(ctx: typer.Context, debug: bool) -> bool:
    """Callback of `--debug`."""
    if debug:
        ctx.meta[_DEBUG] = True
        sys.excepthook = sys.__excepthook__
    return debug
