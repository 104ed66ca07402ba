"""One run of the suite: checks first, then cases in order of importance, within the time there is."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from robust_dpo.bench import package
from robust_dpo.bench.budget import Budget, OutOfTime, Pace, minutes_for
from robust_dpo.bench.cases.base import Case
from robust_dpo.bench.catalogue import cases_for
from robust_dpo.bench.compare import OUT_OF_TIME, first_line, foreign_failures
from robust_dpo.bench.machine import Machine, describe_machine
from robust_dpo.bench.options import PREFLIGHT, Options
from robust_dpo.bench.preflight import Outcome, is_settled, run_sanitizer, run_tests
from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.store import Store, run_key
from robust_dpo.bench.workbench import DeviceLost, Workbench

Log = Callable[[str], None]
# Of the time there is, so that measurements are left whatever the tests do.
_PREFLIGHT_SHARE = {"tests": 0.3, "sanitizer": 0.15}
# One case shall not take the time of all others, however slow one of its peers is.
_PATIENCE_SHARE = 0.04
_ROUNDS = {"cuda": 10, "cpu": 5}
_QUICK_ROUNDS = 3
# A case that was cut short is tried again with so many times the seconds that were not enough.
_MORE_TIME = 2.0


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    Args:
        store: with everything that was measured in the folder under this key.
        failed: whether a check before the measurements, or something of ours, failed.
    """

    store: Store
    failed: bool


def run_suite(options: Options, log: Log, cases: Sequence[Case] | None = None) -> Result:
    """Measure what is asked for and not there yet.

    Args:
        options: what is asked for.
        log: prints a line.
        cases: instead of those of the device.

    Raises:
        ValueError: an option is wrong.
        DataError: the results that are there are not ours.
        DeviceLost: the device cannot be used any more by this process; another one can go on.
    """
    device = options.resolve_device()
    budget = Budget(options.resolve_minutes(device))
    implementations = options.implementations()
    chosen = options.select(list(cases_for(device, quick=options.quick) if cases is None else cases))
    machine = describe_machine(torch.get_num_threads(), device)
    store = Store(options.out, run_key(machine), machine)
    why_cpu = options.why_cpu()
    log(f"device: {_device_sentence(machine, why_cpu)}")
    if machine.busy:
        log(f"{machine.busy}: expect a wide spread")
    if why_cpu is not None and options.preflight and not options.only:
        log(f"{', '.join(PREFLIGHT)}: not run on a CPU")
    if device.type == "cuda":
        _preflight(options, store, budget, log)
    rounds = _QUICK_ROUNDS if options.quick else _ROUNDS[device.type]
    bench = Workbench(
        device,
        implementations,
        rounds,
        _PATIENCE_SHARE * budget.remaining,
        budget.deadline,
        log=log,
        announce=store.announce,
        crashes=store.crashes,
    )
    skipped = _Run(chosen, bench, store, budget, log, machine.busy).measure()
    store.put_skipped(skipped)
    _tell_skipped(skipped, len(chosen), options.resolve_minutes(device), log)
    return Result(store, _failed(store))


def _tell_skipped(skipped: Mapping[str, int], total: int, given: float, log: Log) -> None:
    """Which cases had no time, and which never will have in so many minutes."""
    if skipped:
        log(f"no time for {len(skipped)} of {_counted(total, 'case')}; the same command goes on with what fits:")
    for name, minutes in skipped.items():
        advice = f": needs about {_counted(minutes, 'minute')}, so give it --minutes {minutes}"
        log(f"- {name}{advice if minutes > given else ''}")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _device_sentence(machine: Machine, why_cpu: str | None) -> str:
    if machine.accelerator is not None:
        return machine.accelerator.sentence
    return f"CPU, {machine.cpu}, {machine.threads} threads ({why_cpu})"


def _preflight(options: Options, store: Store, budget: Budget, log: Log) -> None:
    root = package.ROOT if options.checkout is None else options.checkout
    checks: dict[str, Callable[[float], Outcome]] = {
        "tests": lambda timeout: run_tests(root, timeout),
        "sanitizer": run_sanitizer,
    }
    for name, check in checks.items():
        if is_settled(store.preflight.get(name)) or not options.wants_preflight(name):
            continue
        log(f"{name} …")
        outcome = check(max(10.0, _PREFLIGHT_SHARE[name] * budget.remaining))
        store.put_preflight(name, outcome.as_dict())
        log(f"{name}: {outcome.status} ({outcome.detail})")


@dataclass
class _Run:
    """The cases of one run, and the time they have."""

    cases: Sequence[Case]
    bench: Workbench
    store: Store
    budget: Budget
    log: Log
    busy: str | None
    pace: Pace = field(default_factory=Pace)

    def measure(self) -> dict[str, int]:
        """Measure cases until the time is up; returns those that it was not enough for, as in `Store.skipped`.

        What probably takes longer than there is time waits until everything that fits has been measured. One that was
        cut short before is tried again only with more time than it had: it would end in the same way.
        """
        waiting, finished = [], set()
        # Others like it take as long: they wait too, and leave the time to what is not like it.
        for case in self.cases:
            if case.name in self.store.cut_short:
                self.pace.learn(case.group, case.cost, self._least(case))
        for position, case in enumerate(self.cases, 1):
            known = self.store.records.get(case.name)
            if known is not None and _answers(known, case, self.bench):
                self.pace.learn(case.group, case.cost, known.wall_seconds)
                self.log(f"{self._label(position)}: measured before")
                finished.add(case.name)
            elif self._expected(case) >= self.budget.remaining:
                waiting.append((position, case))
            elif self._measure(position, case):
                finished.add(case.name)
        for position, case in waiting:
            if self._least(case) < self.budget.remaining and self._measure(position, case):
                finished.add(case.name)
        left = [case for case in self.cases if case.name not in finished]
        return {case.name: minutes_for(self._expected(case)) for case in left}

    def _label(self, position: int) -> str:
        return f"[{position}/{len(self.cases)}] {self.cases[position - 1].name}"

    def _least(self, case: Case) -> float:
        """Seconds, below which there is no point in trying."""
        return _MORE_TIME * self.store.cut_short.get(case.name, 0.0)

    def _expected(self, case: Case) -> float:
        """Seconds; 0 where nothing like it was ever measured."""
        return max(self._least(case), self.pace.expect(case.group, case.cost))

    def _measure(self, position: int, case: Case) -> bool:
        """Whether there was time for all of it."""
        self.log(f"{self._label(position)} …")
        started = time.monotonic()
        try:
            with self.budget.enforced():
                record = _guarded(case, self.bench)
        except OutOfTime:
            record = None
        except DeviceLost as lost:
            self.store.crash(lost.case, lost.row, lost.reason)
            raise
        seconds = time.monotonic() - started
        complete = record is not None and record.complete
        if complete:
            self.pace.learn(case.group, case.cost, seconds)
        else:
            self.store.put_cut_short(case.name, seconds)
        if record is not None:
            record.wall_seconds = seconds
            record.details |= {} if self.busy is None else {"busy": self.busy}
            if complete or _measured(record) >= _measured(self.store.records.get(case.name)):
                self.store.put(record)
        self.bench.release()
        return complete


def _measured(record: Record | None) -> int:
    """Rows with times."""
    return 0 if record is None else sum(bool(row.seconds) for row in record.rows)


def _guarded(case: Case, bench: Workbench) -> Record:
    """The record of a case; one with the reason where its data do not even fit."""
    try:
        return case.measure(bench)
    except DeviceLost:
        raise
    except foreign_failures() as error:
        bench.log(f"{case.name}: {first_line(error)}")
        return Record(case.name, case.group, case.name, [Row("set-up", Role.PART, failure=first_line(error))])


def _answers(record: Record, case: Case, bench: Workbench) -> bool:
    """Whether a record has all that is asked for now."""
    present = {row.name for row in record.rows} | set(record.details.get("left_out", ()))
    return record.complete and set(case.wants(bench)) <= present


def _failed(store: Store) -> bool:
    checks = any(outcome["status"] == "failed" for outcome in store.preflight.values())
    return checks or any(
        row.role is Role.OURS and row.failure not in (None, OUT_OF_TIME)
        for record in store.records.values()
        for row in record.rows
    )


def go_on_elsewhere(options: Options, minutes: float) -> int:
    """The rest of a run in a new process, after a device was lost; its exit code. The checks had their turn."""
    rest = replace(options, preflight=False)
    command = package.module_command("robust_dpo.bench", *rest.arguments(minutes))
    return subprocess.run(command, env=package.child_environment(), check=False).returncode
