"""Each implementation in its own process: errors and timings from one that stays alive, memory from a fresh one."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from robust_dpo.bench.floor import Floor
from robust_dpo.bench.implementation import Bound
from robust_dpo.bench.memory import extra_bytes
from robust_dpo.bench.problem import Problem, Shape, make_problem
from robust_dpo.bench.registry import IMPLEMENTATIONS
from robust_dpo.bench.solution import Solution
from robust_dpo.bench.timing import Run, Stopwatch

FLOOR = "gemms"
CPU = torch.device("cpu")
Task = Callable[..., None]
_TINY = Shape(vocab=768, width=64, sequences=4, tokens=32)


class WorkerError(RuntimeError):
    """A worker process died; its own traceback is on stderr."""


def time_floor(connection: Connection, problem_path: Path) -> None:
    floor, stopwatch = Floor(Problem.load(problem_path, mmap=True)), Stopwatch(CPU)
    tried = floor.search(stopwatch)
    choices = {"tried": tried, "chosen": floor.choices.values()}
    connection.send({kind: [asdict(choice) for choice in some] for kind, some in choices.items()})
    while connection.recv():
        connection.send(stopwatch.seconds(Run(floor.step)))


def time_implementation(connection: Connection, name: str, problem_path: Path, solution_path: Path) -> None:
    bound = Bound.to(IMPLEMENTATIONS[name], Problem.load(problem_path, mmap=True))
    start = time.perf_counter()
    loss = bound.step()
    first_seconds = time.perf_counter() - start
    errors = Solution.load(solution_path).errors(loss, *bound.gradients())
    connection.send({"first_seconds": first_seconds, "errors": errors})
    stopwatch = Stopwatch(CPU)

    def prepare() -> None:
        bound.clear()
        gc.collect()

    while connection.recv():
        connection.send(stopwatch.seconds(Run(bound.step, prepare, bound.clear)))


def measure_memory(connection: Connection, name: str, problem_path: Path) -> None:
    """Peak above inputs: dhidden and dweight count, inputs, libraries and thread pools do not.

    The baseline is taken after a run of a tiny problem, so that anything an implementation keeps between calls counts.
    What torch.compile keeps (code, guards, caches) is not working memory: there the baseline follows a full run.
    """
    implementation = IMPLEMENTATIONS[name]
    problem = Problem.load(problem_path, mmap=False)
    Bound.to(implementation, make_problem(_TINY, problem.dtype, seed=0)).step()
    bound = Bound.to(implementation, problem)
    del problem
    if "cpu" in implementation.compiles_on:
        bound.step()
        bound.clear()
    connection.send(extra_bytes(bound.step, CPU))


def _enter(task: Task, connection: Connection, threads: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    task(connection, *arguments)


class Worker:
    """A process that answers one question at a time.

    Args:
        task: what it runs, a function of a module, called with its end of the connection and the arguments.
        threads: of torch.
        arguments: have to be picklable.
    """

    def __init__(self, task: Task, threads: int, *arguments: Any) -> None:
        # Read by libgomp and by inductor when they start, which is before any code of ours runs in the child;
        # one compile thread: inductor's pool of helper processes would outlive the measurement.
        os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), TORCHINDUCTOR_COMPILE_THREADS="1")
        self.connection, theirs = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=_enter, args=(task, theirs, threads, arguments), daemon=False
        )
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """The next answer.

        Raises:
            WorkerError: the process ended without one.
        """
        try:
            return self.connection.recv()
        except EOFError as error:
            self.process.join()
            raise WorkerError(f"exit code {self.process.exitcode}") from error

    def ask(self) -> float:
        """Seconds of one more step."""
        self.connection.send(True)
        return float(self.receive())

    def stop(self) -> None:
        if self.process.is_alive():
            self.connection.send(False)
        self.process.join()
