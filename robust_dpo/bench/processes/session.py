"""One measurement of one dtype: memory, then errors, then interleaved rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from robust_dpo.bench.implementation import Implementation
from robust_dpo.bench.problem import Problem, Shape, make_problem, shape_dict
from robust_dpo.bench.processes.workers import (
    FLOOR,
    Worker,
    WorkerError,
    measure_memory,
    time_floor,
    time_implementation,
)
from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.solution import describe, solve


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _prepare(shape: Shape, dtype: torch.dtype, seed: int, folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Write the problem and its float64 solution; returns both paths and what the data look like."""
    problem_path, solution_path = (folder / f"{what}-{dtype_name(dtype)}.pt" for what in ("problem", "solution"))
    make_problem(shape, dtype, seed).save(problem_path)
    # Read back: solve exactly what the workers will read.
    problem = Problem.load(problem_path, mmap=True)
    solution = solve(problem)
    solution.save(solution_path)
    return problem_path, solution_path, describe(problem, solution)


def _memory(row: Row, threads: int, problem_path: Path) -> None:
    worker = Worker(measure_memory, threads, row.name, problem_path)
    answer = worker.receive()
    worker.stop()
    if answer is not None:
        row.extra_bytes, row.memory_method = answer


def _open_timer(row: Row, threads: int, problem_path: Path, solution_path: Path) -> Worker:
    """A living worker whose errors have been measured; the errors go into the row."""
    worker = Worker(time_implementation, threads, row.name, problem_path, solution_path)
    answer = worker.receive()
    row.first_seconds, row.errors = answer["first_seconds"], answer["errors"]
    return worker


def measure(
    implementations: Sequence[Implementation],
    shape: Shape,
    dtype: torch.dtype,
    *,
    rounds: int,
    threads: int,
    seed: int,
    folder: Path,
    memory: bool,
    console: Console,
) -> Record:
    """Measure implementations and the floor at one dtype.

    Only one process computes at any moment. In each round everybody is timed once, starting one place later than in the
    round before, so that drift and noise of the machine fall on all alike. An implementation whose process dies is
    reported as failed and the rest goes on.
    """
    label = dtype_name(dtype)
    torch.set_num_threads(threads)
    with console.status(f"{label}: problem and float64 solution"):
        problem_path, solution_path, data = _prepare(shape, dtype, seed, folder)
    rows = {
        each.name: Row(each.name, Role.OURS if each.ours else Role.PEER, version=each.version)
        for each in implementations
    }
    rows[FLOOR] = Row(FLOOR, Role.FLOOR)
    timers: dict[str, Worker] = {}
    try:
        with console.status(f"{label}: fastest matrix products"):
            timers[FLOOR] = Worker(time_floor, threads, problem_path)
            products = timers[FLOOR].receive()
        for each in implementations:
            row = rows[each.name]
            with console.status(f"{label}: {each.name}: memory and errors"):
                try:
                    if memory:
                        _memory(row, threads, problem_path)
                    timers[each.name] = _open_timer(row, threads, problem_path, solution_path)
                except WorkerError as failure:
                    row.failure = str(failure)
                    console.print(f"{label}: {each.name} failed: {failure}", style="red")
        # One untimed step each: the first one compiled and touched memory for the first time.
        for worker in timers.values():
            worker.ask()
        order = list(timers)
        for turn in range(rounds):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                with console.status(f"{label}: round {turn + 1} of {rounds}: {name}"):
                    rows[name].seconds.append(timers[name].ask())
    finally:
        for worker in timers.values():
            worker.stop()
    return Record(
        name=f"head {label}",
        group="head",
        title=label,
        rows=list(rows.values()),
        dtype=label,
        sizes=shape_dict(shape),
        flops=4 * shape.product_flops,
        check="float64 on the same inputs",
        details={"floor_choices": products["chosen"], "floor_tried": products["tried"], "data": data},
    )
