"""YAML config files: keys are the long option names; the command line overrides; unknown keys are refused."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

import typer
import yaml


def nearest(name: str, valid: Collection[str]) -> str:
    """A hint for a misspelt name: `; did you mean 'x'?`, or the list of valid names."""
    close = get_close_matches(name, valid, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; valid names: {', '.join(sorted(valid))}"


def _mapping(path: Path, loader: yaml.SafeLoader, node: yaml.Node | None, valid: Collection[str]) -> dict[str, object]:
    """Keys (with - or _) and values of a mapping node; refuses unknown and repeated keys with file and line."""
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise typer.BadParameter(f"{path}:{node.start_mark.line + 1}: expected 'option: value' lines")
    values: dict[str, object] = {}
    for key_node, value_node in node.value:
        place = f"{path}:{key_node.start_mark.line + 1}"
        key = str(key_node.value).lstrip("-").replace("-", "_")
        if key not in valid:
            raise typer.BadParameter(f"{place}: unknown key '{key_node.value}'{nearest(key, valid)}")
        if key in values:
            raise typer.BadParameter(f"{place}: key '{key_node.value}' is given twice")
        values[key] = loader.construct_object(value_node, deep=True)
    return values


def read_config(path: Path, command: str, options: Collection[str], commands: Collection[str]) -> dict[str, object]:
    """Options of `command` from a YAML file.

    A file is flat (every key is an option of the command), or has one section per command, so that one file can hold a
    whole pipeline; then only the section of `command` is read.

    Raises:
        typer.BadParameter: unreadable YAML, an unknown or repeated key, with file and line.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode) and node.value and all(key.value in commands for key, _ in node.value):
            node = next((value for key, value in node.value if key.value == command), None)
        return {key: value for key, value in _mapping(path, loader, node, options).items() if value is not None}
    except yaml.MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        raise typer.BadParameter(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path}: not a YAML text file: {error}") from error


def apply_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Callback of the eager option `--config`: the file's values become the defaults of this call."""
    if path is not None and ctx.info_name is not None and ctx.parent is not None:
        options = {name for parameter in ctx.command.params if (name := parameter.name) not in (None, "config", "help")}
        commands = getattr(ctx.parent.command, "commands", {})
        ctx.default_map = read_config(path, ctx.info_name, options, commands)
    return path
