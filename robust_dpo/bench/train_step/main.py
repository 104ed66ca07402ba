"""The command line of the comparison of whole training steps."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from rich.console import Console

from robust_dpo.bench.machine import describe_machine
from robust_dpo.bench.main import words
from robust_dpo.bench.record import Record, Role
from robust_dpo.bench.store import Store, run_key
from robust_dpo.bench.tables import replace_between, rich_table
from robust_dpo.bench.train_step.contestants import CONTESTANTS, choose, ours_with
from robust_dpo.bench.train_step.data import make_workload
from robust_dpo.bench.train_step.session import measure
from robust_dpo.bench.train_step.setting import DTYPES, MODELS, REFERENCES, Setting
from robust_dpo.bench.train_step.tables import STEP_TERMINAL_COLUMNS, data_sentence, results_markdown, verdict_table
from robust_dpo.bench.train_step.targets import verdicts
from robust_dpo.errors import DataError

MARKER = "train_step"
PAGE = "results.md"
USAGE_ERROR = 2
T = TypeVar("T")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def _list_of(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse_names(text: str) -> tuple[str, ...]:
        names = words(text)
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"expected names out of {', '.join(allowed)}, got {', '.join(unknown)}")
        return names

    return parse_names


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, words(text)))
    if not sizes or min(sizes) < 2:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 2, got {text}")
    return sizes


def _fields(text: str) -> dict[str, Any]:
    """`layout=padded,backend=torch` as a dictionary; values are read as YAML."""
    pairs = [word.partition("=") for word in words(text)]
    if not pairs or any(not sign or not value for _, sign, value in pairs):
        raise argparse.ArgumentTypeError(f"expected fields of RobustDPOConfig as name=value, got {text!r}")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def parse(arguments: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of results.json and results.md; called again with the same, comparisons are added or replaced",
    )
    parser.add_argument("--data", type=Path, help="file of preferences; default: random token ids")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    models = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", type=_list_of(list(MODELS)), default=tuple(models), help=", ".join(MODELS))
    parser.add_argument("--dtype", type=_list_of(DTYPES), default=DTYPES, help="fp32, bf16 (autocast)")
    parser.add_argument("--reference", type=_list_of(REFERENCES), default=REFERENCES, help=", ".join(REFERENCES))
    parser.add_argument("--responses", type=_sizes, default=(2, 4), help="of a group; default 2,4")
    parser.add_argument("--groups", type=_positive, default=4, help="of a step; default 4")
    parser.add_argument("--max-length", type=_positive, default=512, help="tokens of prompt and response; default 512")
    parser.add_argument("--rounds", type=_positive, default=8, help="timed steps; default 8")
    parser.add_argument("--warmups", type=_positive, default=3, help="untimed steps; default 3")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of the models; default sdpa")
    parser.add_argument("--compare", type=words, default=(), help=f"only these: {', '.join(CONTESTANTS)}")
    parser.add_argument(
        "--also-ours",
        type=_fields,
        action="append",
        default=[],
        metavar="NAME=VALUE,…",
        help="one more row: our trainer with these fields of its configuration; may be given more than once",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps, to see that everything runs")
    parser.add_argument("--docs", type=Path, help=f"Markdown file with {MARKER} markers to update")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.rounds, options.warmups, options.max_length = ("tiny",), 2, 1, 64
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected auto or cpu on this machine, got cuda")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        options.contestants = [*choose(options.compare), *map(ours_with, options.also_ours)]
    except ValueError as error:
        parser.error(str(error))
    return options


def settings(options: argparse.Namespace) -> list[Setting]:
    """All comparisons that are asked for."""
    choices = product(options.models, options.responses, options.reference, options.dtype)
    return [
        Setting(
            model=MODELS[model],
            dtype=dtype,
            reference=reference,
            responses=responses,
            groups=options.groups,
            max_length=options.max_length,
            warmups=options.warmups,
            rounds=options.rounds,
            device=options.device,
            attention=options.attention,
            seed=options.seed,
        )
        for model, responses, reference, dtype in choices
    ]


def main(arguments: Sequence[str] | None = None, description: str | None = None) -> int:
    """Run; the exit code is 1 if ours failed, 2 for an argument or data that cannot be used."""
    options = parse(arguments, description)
    console = Console(width=None if sys.stdout.isatty() else 160)
    machine = describe_machine(options.threads, options.device)
    try:
        store = Store(options.out, run_key(machine), machine)
        measured = [_measure(setting, store, options, console) for setting in settings(options)]
    except DataError as error:
        console.print(f"error: {error}", markup=False)
        return USAGE_ERROR
    if found := verdicts(measured):
        console.print(verdict_table(found))
    console.print(f"written: {store.path}, {options.out / PAGE}", soft_wrap=True)
    return int(any(row.failure and row.role is Role.OURS for record in measured for row in record.rows))


def _measure(setting: Setting, store: Store, options: argparse.Namespace, console: Console) -> Record:
    """One comparison, printed and written down at once: who is killed keeps what was measured."""
    workload = make_workload(setting, options.data)
    contestants = [each for each in options.contestants if each.takes_part(setting)]
    with tempfile.TemporaryDirectory(prefix="robust-dpo-bench-") as folder:
        record = measure(contestants, setting, workload, threads=options.threads, folder=Path(folder), console=console)
    console.print(rich_table(record, STEP_TERMINAL_COLUMNS))
    console.print(data_sentence(record), soft_wrap=True)
    store.put(record)
    page = results_markdown(store)
    (options.out / PAGE).write_text(page, encoding="utf-8")
    if options.docs:
        replace_between(options.docs, MARKER, page)
    return record
