"""One run of the suite: checks first, then cases in order of importance, within the time there is."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from robust_dpo.bench import package
from robust_dpo.bench.budget import Budget, OutOfTime, Pace
from robust_dpo.bench.cases.base import Case
from robust_dpo.bench.catalogue import cases_for
from robust_dpo.bench.compare import OUT_OF_TIME, first_line, foreign_failures
from robust_dpo.bench.machine import describe_machine
from robust_dpo.bench.options import Options
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
    store.put_skipped(_measure(chosen, bench, store, budget, log))
    return Result(store, _failed(store))


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


def _measure(cases: Sequence[Case], bench: Workbench, store: Store, budget: Budget, log: Log) -> list[str]:
    """Measure cases until the time is up; returns the names of those that there was no time for."""
    pace, skipped = Pace(), []
    for position, case in enumerate(cases, 1):
        known = store.records.get(case.name)
        if known is not None and _answers(known, case, bench):
            pace.learn(case.group, case.cost, known.wall_seconds)
            log(f"[{position}/{len(cases)}] {case.name}: measured before")
            continue
        if pace.expect(case.group, case.cost) >= budget.remaining:
            skipped.append(case.name)
            continue
        log(f"[{position}/{len(cases)}] {case.name} …")
        started = time.monotonic()
        try:
            with budget.enforced():
                record = _guarded(case, bench)
        except OutOfTime:
            skipped.append(case.name)
            bench.release()
            continue
        except DeviceLost as lost:
            store.crash(lost.case, lost.row, lost.reason)
            raise
        record.wall_seconds = time.monotonic() - started
        if record.complete:
            pace.learn(case.group, case.cost, record.wall_seconds)
        store.put(record)
        bench.release()
    return skipped


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
