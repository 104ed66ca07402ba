"""Exit codes of every command: one table for the code, `--help` and docs/cli.md."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a shell sees when a command ends."""

    OK = 0
    FAILED = 1
    USAGE = 2
    DATA = 3
    MODEL = 4
    EXISTS = 5
    INTERRUPTED = 130


MEANING: dict[ExitCode, str] = {
    ExitCode.OK: "everything was done",
    ExitCode.FAILED: "the run failed (for instance a non-finite loss), or doctor found nothing that can run",
    ExitCode.USAGE: "an option, its value, or a key of the config file is wrong",
    ExitCode.DATA: "a data file is missing or cannot be used; the message names file and line",
    ExitCode.MODEL: "a model or tokenizer cannot be loaded",
    ExitCode.EXISTS: "the output is already there; nothing was overwritten",
    ExitCode.INTERRUPTED: "interrupted by the user; train continues with --resume",
}


def exit_code_help() -> str:
    """The table as the last paragraph of `robust-dpo --help`."""
    return "**Exit codes**\n\n" + "\n".join(f"* {int(code)}: {text}" for code, text in MEANING.items())
