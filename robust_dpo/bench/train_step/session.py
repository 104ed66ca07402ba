"""One comparison: every contestant in a process of its own, all of them step by step in turns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console

from robust_dpo.bench.processes.workers import Worker, WorkerError
from robust_dpo.bench.record import Record, Row
from robust_dpo.bench.train_step.contestants import EXACT, Contestant
from robust_dpo.bench.train_step.data import Workload
from robust_dpo.bench.train_step.setting import Setting
from robust_dpo.bench.train_step.turnstile import Passage
from robust_dpo.bench.train_step.worker import Finished, train, weight_errors, weights_of

GROUP = "train_step"


def measure(
    contestants: Sequence[Contestant],
    setting: Setting,
    workload: Workload,
    *,
    threads: int,
    folder: Path,
    console: Console,
) -> Record:
    """Train with every contestant on the same groups from the same weights.

    Only one process computes at any moment. In every round each of them takes the step on the same groups once,
    starting one place later than in the round before, so that drift of the machine falls on all alike. One that dies
    is reported as failed and the rest goes on.

    Args:
        contestants: who takes part.
        setting: what is trained.
        workload: on what.
        threads: of every process.
        folder: for the trained weights, gone afterwards.
        console: shows what is going on.
    """
    runners = [_Runner(each, folder / f"{index}.pt") for index, each in enumerate(contestants)]
    try:
        for runner in runners:
            with console.status(f"{setting.name}: {runner.row.name}: first steps"):
                runner.start(setting, workload, threads)
        for turn in range(setting.rounds):
            first = turn % len(runners)
            for runner in runners[first:] + runners[:first]:
                with console.status(f"{setting.name}: round {turn + 1} of {setting.rounds}: {runner.row.name}"):
                    runner.step()
        with console.status(f"{setting.name}: comparing losses and weights"):
            for runner in runners:
                runner.finish()
            _compare(runners, setting)
    finally:
        for runner in runners:
            runner.stop()
    return Record(
        name=setting.name,
        group=GROUP,
        title=setting.name,
        rows=[runner.row for runner in runners],
        dtype=setting.dtype,
        check=f"{EXACT[setting.dtype]}, step by step",
        details={
            "setting": setting.as_dict(),
            "losses": {runner.row.name: runner.losses for runner in runners},
            "cpu_seconds": {runner.row.name: runner.cpu_seconds for runner in runners},
            "step_bytes": {runner.row.name: runner.step_bytes for runner in runners},
            "tokens": workload.tokens(setting.groups)[setting.warmups :],
            "source": workload.source,
            "prompt_share": workload.prompt_share,
            "padding_share": workload.padding_share(setting.groups),
        },
    )


class _Runner:
    """A contestant's process and its row; does nothing any more once the process has died."""

    def __init__(self, contestant: Contestant, weights: Path) -> None:
        self.contestant, self.weights = contestant, weights
        self.row = Row(contestant.name, contestant.role)
        self.losses: list[float] = []
        self.cpu_seconds: list[float] = []
        self.step_bytes: int | None = None
        self._worker: Worker | None = None

    def start(self, setting: Setting, workload: Workload, threads: int) -> None:
        """Start, and take the untimed steps."""
        self._worker = Worker(train, threads, self.contestant, setting, workload.rows, self.weights)
        passage = self._receive()
        self.row.first_seconds = None if passage is None else passage.seconds
        for _ in range(setting.warmups - 1):
            self._ask()

    def step(self) -> None:
        passage = self._ask()
        if passage is not None:
            self.row.seconds.append(passage.seconds)
            self.cpu_seconds.append(passage.cpu_seconds)

    def finish(self) -> None:
        """Let it end, and take down its memory."""
        found = self._answer(True)
        if isinstance(found, Finished):
            self.row.extra_bytes, self.row.memory_method = found.peak_bytes, found.method
            self.step_bytes = found.step_bytes

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
        self.weights.unlink(missing_ok=True)

    def _ask(self) -> Passage | None:
        return self._receive(True)

    def _receive(self, go: bool = False) -> Passage | None:
        passage = self._answer(go)
        if not isinstance(passage, Passage):
            return None
        self.losses.append(passage.loss)
        return passage

    def _answer(self, go: bool) -> object:
        """What the process says next, after having been told to go on; None once it has died."""
        if self._worker is None or self.row.failure is not None:
            return None
        try:
            if go:
                # Who is dead already is found out by asking for the answer, with its exit code.
                with suppress(BrokenPipeError):
                    self._worker.connection.send(True)
            return self._worker.receive()
        except WorkerError as failure:
            self.row.failure, self.row.seconds = str(failure), []
            return None


def _compare(runners: Sequence[_Runner], setting: Setting) -> None:
    """Losses and trained weights of everybody against those of the plain loop in a wider dtype."""
    wider = EXACT[setting.dtype]
    exact = next((each for each in runners if each.row.name == wider and each.row.failure is None), None)
    if exact is None:
        return
    start = weights_of(setting.policy())
    expected = torch.load(exact.weights, mmap=True)
    for runner in runners:
        if runner is exact or runner.row.failure is not None:
            continue
        pairs = zip(runner.losses, exact.losses, strict=True)
        runner.row.errors["loss"] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
        runner.row.errors |= weight_errors(torch.load(runner.weights, mmap=True), expected, start)
