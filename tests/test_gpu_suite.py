"""The suite for GPU machines on a CPU with toy shapes: what it measures, when it stops, how it goes on."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from robust_dpo import backends
from robust_dpo.bench import catalogue, implementation, main, package, preflight, report, rounding, smoke, suite
from robust_dpo.bench import compare as compare_module
from robust_dpo.bench import machine as machine_module
from robust_dpo.bench.budget import Budget, OutOfTime, Pace, minutes_for
from robust_dpo.bench.cases import epilogue
from robust_dpo.bench.cases.base import GRADIENT_LIMIT, KERNEL_LIMIT, Case
from robust_dpo.bench.cases.epilogue import EpilogueCase
from robust_dpo.bench.cases.head import HeadCase
from robust_dpo.bench.cases.row_shapes import RowShapesCase, label, shapes_around
from robust_dpo.bench.compare import OUT_OF_TIME, Candidate, Opened, compare, wrong_results
from robust_dpo.bench.implementation import Implementation
from robust_dpo.bench.machine import describe_machine
from robust_dpo.bench.options import Options
from robust_dpo.bench.ours import ours
from robust_dpo.bench.plots import draw
from robust_dpo.bench.preflight import run_sanitizer, run_tests
from robust_dpo.bench.problem import Shape
from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.registry import choose
from robust_dpo.bench.report import headline, results_markdown
from robust_dpo.bench.store import Store, run_key
from robust_dpo.bench.suite import run_suite
from robust_dpo.bench.timing import Run, Stopwatch
from robust_dpo.bench.workbench import DeviceLost, Workbench
from robust_dpo.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_suite.py"
CPU = torch.device("cpu")
GPU_OR_CPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = Shape(vocab=97, width=16, sequences=4, tokens=4, prompt=0)
PNG = b"\x89PNG"
# Many tiny operators: see the fixture.
pytestmark = pytest.mark.usefixtures("one_thread")


def options(out: Path, **values) -> Options:
    return Options(**{"out": out, "device": "cpu", "quick": True, "compare": ("plain",), **values})


def silent(line: str) -> None:
    """No log."""


def bench(*names: str, **values) -> Workbench:
    return Workbench(CPU, choose(names or ["plain", "ours"]), rounds=2, **values)


@dataclass(frozen=True)
class Sleep(Case):
    """Takes a known time."""

    label: str
    seconds: float

    @property
    def name(self) -> str:
        return self.label

    @property
    def group(self) -> str:
        return "sleep"

    @property
    def cost(self) -> float:
        return self.seconds

    def measure(self, bench: Workbench) -> Record:
        time.sleep(self.seconds)
        return Record(self.name, self.group, self.name, [Row("sleep", Role.PART, [self.seconds])])


class OtherSleep(Sleep):
    """Of a group that nothing is known of."""

    @property
    def group(self) -> str:
        return "other sleep"


@pytest.fixture(scope="module")
def finished(one_thread, tmp_path_factory) -> tuple[Path, suite.Result]:
    """A whole quick run of every kind of case."""
    out = tmp_path_factory.mktemp("suite")
    written = main.run_and_write(options(out, minutes=3), silent)
    assert written.exit_code == 0 and written.result is not None
    return out, written.result


def test_every_kind_of_case_is_measured(finished) -> None:
    _, result = finished
    records = result.store.records
    assert list(records) == [case.name for case in catalogue.quick_cases()]
    for record in records.values():
        assert record.complete
        for row in record.rows:
            assert row.failure is None, f"{record.name}: {row.name}: {row.failure}"
            assert row.seconds and min(row.seconds) > 0
            assert all(math.isfinite(error) for error in row.errors.values())
    assert not result.failed and not result.store.skipped


def test_head_record_has_floor_errors_and_bound(finished) -> None:
    _, result = finished
    record = next(record for record in result.store.records.values() if record.group == "head")
    rows = {row.name: row for row in record.rows}
    assert rows["gemms"].role is Role.FLOOR and rows["ours"].role is Role.OURS and rows["plain"].role is Role.PEER
    assert set(rows["ours"].errors) == {"loss", "dhidden", "dweight"}
    assert rows["plain"].version == torch.__version__
    weight, hidden, targets = 211 * 32 * 2, 64 * 32 * 2, 64 * 8
    assert record.input_bytes == weight + hidden + targets + 8 * 4  # cached log-probs in fp32
    assert record.bound_bytes == record.input_bytes + hidden + weight + 2 * weight + 64 * 211 * 2
    assert record.flops == 6 * 64 * 32 * 211


def test_files_of_a_run(finished) -> None:
    out, result = finished
    text = (out / "results.md").read_text()
    for expected in ("## Headline", "## LM head", "## Chunk size", "## row_logprob", "| gemms |", "Checked against"):
        assert expected in text
    assert f"torch {torch.__version__}" in text and result.store.key["code"] in text
    for name in ("head.png", "bandwidth.png", "chunks.png"):
        assert (out / name).read_bytes().startswith(PNG)
    assert {line.case for line in headline(result.store.records)} <= {r.title for r in result.store.records.values()}


def test_a_second_run_measures_nothing_again(finished) -> None:
    out, result = finished
    before = {name: record.as_dict() for name, record in result.store.records.items()}
    lines = []
    again = run_suite(options(out, minutes=3), lines.append)
    assert {name: record.as_dict() for name, record in again.store.records.items()} == before
    assert len([line for line in lines if line.endswith("measured before")]) == len(before)


def test_another_implementation_is_measured_later(tmp_path) -> None:
    cases = [HeadCase(TINY, torch.float32)]
    run_suite(options(tmp_path), silent, cases)
    added = run_suite(options(tmp_path, compare=("plain", "dora_authors")), silent, cases)
    (record,) = added.store.records.values()
    assert {"plain", "dora_authors"} <= {row.name for row in record.rows}


def test_another_key_starts_fresh_beside_it(tmp_path) -> None:
    machine = describe_machine(1)
    key = run_key(machine)
    assert set(key) == {"code", "device", "driver", "torch", "triton"}
    Store(tmp_path, key, machine).put(Record("case", "head", "case", [Row("x")]))
    other = Store(tmp_path, {**key, "torch": "another"}, machine)
    assert not other.records
    assert list(Store(tmp_path, key, machine).records) == ["case"]
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "results.json:1: not valid JSON"), ("[]", "format 2"), ('{"format": 9}', "format 2")],
    ids=["broken", "a list", "another format"],
)
def test_results_that_are_not_ours_are_refused(tmp_path, content, message) -> None:
    (tmp_path / "results.json").write_text(content)
    machine = describe_machine(1)
    with pytest.raises(DataError, match=message):
        Store(tmp_path, run_key(machine), machine)
    assert (tmp_path / "results.json").read_text() == content


def test_the_time_is_kept_and_the_rest_comes_next_time(tmp_path) -> None:
    cases = [Sleep("first", 0.3), Sleep("long", 60.0), Sleep("last", 0.01)]
    started = time.monotonic()
    result = run_suite(options(tmp_path, minutes=6 / 60), silent, cases)
    assert time.monotonic() - started < 12
    # "long" probably takes a minute: the short one goes first, and the rest of the time is not enough.
    assert list(result.store.records) == ["first", "last"] and list(result.store.skipped) == ["long"]
    assert "long" in results_markdown(result.store)
    shorter = [*cases[:1], Sleep("long", 0.2), *cases[2:]]
    assert not run_suite(options(tmp_path, minutes=1), silent, shorter).store.skipped


def test_a_case_is_interrupted_when_the_time_is_up(tmp_path) -> None:
    started = time.monotonic()
    result = run_suite(options(tmp_path, minutes=1 / 60), silent, [Sleep("unknown", 60.0), Sleep("other", 50.0)])
    assert time.monotonic() - started < 5
    assert list(result.store.skipped) == ["unknown", "other"] and not result.store.records
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_what_was_too_long_does_not_starve_the_others(tmp_path) -> None:
    cases, lines = [Sleep("long", 60.0), Sleep("short", 0.01)], []
    first = run_suite(options(tmp_path, minutes=1 / 60), silent, cases)
    assert list(first.store.skipped) == ["long", "short"]
    second = run_suite(options(tmp_path, minutes=1 / 60), lines.append, cases)
    assert list(second.store.records) == ["short"] and list(second.store.skipped) == ["long"]
    # It had 0.9 seconds, and would now have as many: twice that is what it may be worth to try.
    assert not [line for line in lines if line.startswith("[1/2]")]
    assert "no time for 1 of 2 cases; the same command goes on with what fits:" in lines
    assert "- long: needs about 1 minute, so give it --minutes 1" in lines
    assert "- long: --minutes 1" in results_markdown(second.store)
    like = [Sleep("alike", 60.0), OtherSleep("other", 0.01)]
    third = run_suite(options(tmp_path, minutes=1 / 60), silent, [*cases, *like])
    assert list(third.store.records) == ["short", "other"] and list(third.store.skipped) == ["long", "alike"]
    done = run_suite(options(tmp_path, minutes=1), silent, [Sleep("long", 0.01), cases[1]])
    assert not done.store.skipped and "long" not in done.store.cut_short


@pytest.mark.parametrize("seconds", [1.0, 50.0, 54.0, 179.0, 181.0, 460.0, 461.0])
def test_minutes_are_enough_and_no_more(seconds) -> None:
    minutes = minutes_for(seconds)
    assert minutes == 1 or Budget(minutes - 1).remaining < seconds
    assert Budget(minutes).remaining > seconds - 0.1


def test_what_was_measured_before_the_alarm_is_kept(tmp_path) -> None:
    pauses = iter([0.0] * 4 + [60.0] * 9)

    @dataclass(frozen=True)
    class Slow(Sleep):
        def measure(self, bench: Workbench) -> Record:
            runs = {"a": Run(lambda: None), "b": Run(lambda: time.sleep(next(pauses)))}
            candidates = [
                Candidate(Row(name, Role.OURS), lambda run=run: Opened(run, {"loss": 0.0}), {"loss": 1.0}, False)
                for name, run in runs.items()
            ]
            complete = compare(candidates, bench, self.name, rounds=9)
            return Record(self.name, self.group, self.name, [each.row for each in candidates], complete=complete)

    result = run_suite(options(tmp_path, minutes=2 / 60), silent, [Slow("slow", 1.0)])
    (record,) = result.store.records.values()
    assert not record.complete and [len(row.seconds) for row in record.rows] == [3, 3]
    assert list(result.store.skipped) == ["slow"] and 1 < result.store.cut_short["slow"] < 3
    assert "Time ran out before everything was measured" in results_markdown(result.store)
    # One that gets less far does not take its place.
    pauses = iter([60.0] * 9)
    result.store.put_cut_short("slow", 0.1)
    (again,) = run_suite(options(tmp_path, minutes=1 / 60), silent, [Slow("slow", 1.0)]).store.records.values()
    assert again == record


def test_the_alarm_passes_through_handlers_of_exceptions() -> None:
    assert not issubclass(OutOfTime, Exception)
    with pytest.raises(OutOfTime), Budget(0.2 / 60, 0).enforced():
        try:
            time.sleep(5)
        except Exception:  # what a peer may do
            pytest.fail("swallowed")


def test_patience_ends_the_rounds_of_one_case() -> None:
    row = Row("slow", Role.OURS)
    run = Run(lambda: time.sleep(0.1))
    candidate = Candidate(row, lambda: Opened(run, {}), {}, takes_memory=False)
    assert compare([candidate], bench(patience=0.15), "case", rounds=50, warmups=0)
    assert len(row.seconds) == 3


def test_pace_scales_with_cost_and_takes_the_nearest() -> None:
    pace = Pace()
    assert pace.expect("head", 100) == 0
    pace.learn("head", 100, 4.0)
    pace.learn("head", 1, 3.0)
    assert pace.expect("head", 200) == 8.0
    assert pace.expect("head", 50) == 4.0
    assert pace.expect("rows", 100) == 0


def test_rows_without_time_are_measured_next_time(tmp_path) -> None:
    case = HeadCase(TINY, torch.float32)
    late = case.measure(bench(deadline=0.0))
    assert not late.complete
    assert {row.failure for row in late.rows} == {OUT_OF_TIME}
    again = case.measure(bench())
    assert again.complete and all(row.seconds for row in again.rows)


@pytest.fixture
def registered():
    """Registers implementations for one test."""
    before = dict(implementation.IMPLEMENTATIONS)
    yield implementation.add
    implementation.IMPLEMENTATIONS.clear()
    implementation.IMPLEMENTATIONS.update(before)


def wrong_gradient(problem):
    """The right loss of a head that is a tenth too large."""
    right = ours(problem)
    return lambda hidden, weight: right(hidden, weight) + 0 * weight.sum() + (weight - weight.detach()).sum()


def wrong_loss(problem):
    return lambda hidden, weight: 1.5 * ours(problem)(hidden, weight)


def not_a_number(problem):
    return lambda hidden, weight: ours(problem)(hidden, weight) * float("nan")


@pytest.mark.parametrize("build", [wrong_gradient, wrong_loss, not_a_number], ids=lambda build: build.__name__)
@pytest.mark.parametrize("mine", [True, False], ids=["ours", "peer"])
def test_a_wrong_implementation_is_reported_and_not_timed(tmp_path, registered, build, mine) -> None:
    registered(Implementation("wrong", build, ours=mine))
    result = run_suite(options(tmp_path, compare=("wrong", "plain")), silent, [HeadCase(TINY, torch.float32)])
    (record,) = result.store.records.values()
    rows = {row.name: row for row in record.rows}
    assert rows["wrong"].failure.startswith("wrong: ") and "off by" in rows["wrong"].failure
    assert not rows["wrong"].seconds and rows["ours"].seconds and rows["plain"].seconds
    assert result.failed is mine  # what a peer gets wrong is a finding
    assert "failed: wrong: " in results_markdown(result.store)
    # Not measured again until code changes, and reported again.
    assert run_suite(options(tmp_path, compare=("wrong", "plain")), silent, []).failed is mine


def test_a_peer_that_fails_is_recorded_and_the_rest_goes_on(tmp_path, registered) -> None:
    def build(problem):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore lines")

    registered(Implementation("greedy", build))
    result = run_suite(options(tmp_path, compare=("greedy", "plain")), silent, [HeadCase(TINY, torch.float32)])
    (record,) = result.store.records.values()
    rows = {row.name: row for row in record.rows}
    assert rows["greedy"].failure == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"
    assert rows["plain"].seconds and not result.failed


def test_who_fails_between_the_rounds_is_dropped_from_them(tmp_path, registered) -> None:
    calls = []

    def build(problem):
        right = ours(problem)

        def loss(hidden, weight):
            calls.append(1)
            if len(calls) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return right(hidden, weight)

        return loss

    registered(Implementation("tired", build))
    result = run_suite(options(tmp_path, compare=("tired", "plain")), silent, [HeadCase(TINY, torch.float32)])
    (record,) = result.store.records.values()
    rows = {row.name: row for row in record.rows}
    assert rows["tired"].failure == "OutOfMemoryError: CUDA out of memory" and not rows["tired"].seconds
    assert len(rows["plain"].seconds) == 3 and len(calls) == 3


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  565.57.01  Thu Oct 10 12:29:05 UTC 2024\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  565.57.01  Release Build\n",
    ],
    ids=["closed", "open"],
)
def test_driver_version_is_found(tmp_path, monkeypatch, text) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(machine_module, "_DRIVER", tmp_path / "version")
    assert machine_module._driver() == "565.57.01"


def test_a_problem_that_does_not_fit_is_recorded(tmp_path, monkeypatch) -> None:
    def too_large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("robust_dpo.bench.workbench.make_problem", too_large)
    cases = [HeadCase(TINY, torch.float32), Sleep("after", 0.0)]
    result = run_suite(options(tmp_path), silent, cases)
    assert result.store.records[cases[0].name].rows[0].failure == "OutOfMemoryError: CUDA out of memory"
    assert "after" in result.store.records


def test_a_lost_device_is_blamed_and_another_process_goes_on(tmp_path, monkeypatch, registered) -> None:
    def build(problem):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def lost(bench, case, row):
        raise DeviceLost(case, row.name, row.failure)

    started = []

    def go_on(given, minutes):
        started.append(given.arguments(minutes))
        return 7

    registered(Implementation("breaker", build))
    monkeypatch.setattr(suite, "cases_for", lambda device, quick: [HeadCase(TINY, torch.float32)])
    monkeypatch.setattr(compare_module, "_check_device", lost)
    monkeypatch.setattr(main, "go_on_elsewhere", go_on)
    given = options(tmp_path, compare=("breaker", "plain"), minutes=2.0)
    assert main.run_and_write(given, silent).exit_code == 7
    again = main.parse(started[0])
    assert 1.5 < again.minutes < 2.0
    assert dataclasses.replace(again, minutes=2.0) == given
    monkeypatch.undo()
    (record,) = run_suite(given, silent, [HeadCase(TINY, torch.float32)]).store.records.values()
    rows = {row.name: row for row in record.rows}
    assert "illegal memory access" in rows["breaker"].failure and rows["plain"].seconds


def test_who_takes_the_process_down_twice_is_not_tried_again(tmp_path) -> None:
    machine = describe_machine(1)
    key = run_key(machine)
    for _ in range(2):
        store = Store(tmp_path, key, machine)
        assert not store.crashes
        store.announce("case", "innocent")
        store.announce("case", "breaker")
    store = Store(tmp_path, key, machine)
    assert list(store.crashes) == [("case", "breaker")] and "died 2 times" in store.crashes["case", "breaker"]
    store.announce("case", "innocent")
    store.put(Record("case", "head", "case", []))
    assert list(Store(tmp_path, key, machine).crashes) == [("case", "breaker")]


def test_limits_are_inclusive_and_nan_is_wrong() -> None:
    assert wrong_results({"loss": 0.1}, {"loss": 0.1}) is None
    assert "loss off by 1.1e-01" in (wrong_results({"loss": 0.11, "logp": 0.0}, {"loss": 0.1, "logp": 0.1}) or "")
    assert wrong_results({"loss": float("nan")}, {"loss": 0.1}) is not None


def test_errors_of_this_package_are_not_swallowed_as_findings() -> None:
    class Odd(Exception):
        """Nothing that a library raises."""

    def open_() -> Opened:
        raise Odd

    with pytest.raises(Odd):
        compare([Candidate(Row("x"), open_, {})], bench(), "case", rounds=1)


def test_memory_is_measured_between_prepare_and_finish() -> None:
    held, seen = [], []

    def call() -> None:
        held.append(torch.ones(32 << 20, dtype=torch.uint8))

    run = Run(call, lambda: seen.append("prepare"), lambda: (seen.append("finish"), held.clear()))
    row = Row("x", Role.OURS)
    compare([Candidate(row, lambda: Opened(run, {}), {})], bench(), "case", rounds=1, warmups=0)
    assert row.extra_bytes is not None and 28 << 20 < row.extra_bytes < 48 << 20
    assert seen == ["prepare", "finish"] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"minutes": 0.0}, "minutes: expected"),
        ({"minutes": float("nan")}, "minutes: expected"),
        ({"device": "tpu"}, "device: expected one of auto, cpu, cuda, got 'tpu'"),
        ({"only": ("heads",)}, "only: expected groups out of tests, sanitizer, ceilings, head"),
        ({"compare": ("nobody",)}, "implementations: expected names out of"),
        ({"compare": ("quack_mean_ce",)}, "compare: expected implementations whose package is installed"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options_name_argument_and_value(tmp_path, values, message) -> None:
    if values == {"compare": ("quack_mean_ce",)} and importlib.util.find_spec("quack"):
        pytest.skip("quack is installed")
    with pytest.raises(ValueError, match=message):
        run_suite(options(tmp_path / "out", **values), silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("only", ["tests", "sanitizer,epilogue"])
def test_checks_of_a_gpu_are_refused_without_one(tmp_path, capsys, only) -> None:
    assert main.main(["--out", str(tmp_path / "out"), "--only", only, "--quick"]) == 2
    message = capsys.readouterr().err
    assert f"only: expected groups of cases on a CPU, got {only.split(',')[0]}: not run, " in message
    assert machine_module.why_no_gpu() in message and not (tmp_path / "out").exists()


def test_torch_says_why_there_is_no_gpu(monkeypatch) -> None:
    def fail() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nMore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", fail)
    assert machine_module.why_no_gpu() == "no GPU can be used: Found no NVIDIA driver on your system."
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert machine_module.why_no_gpu() == "this torch is built without CUDA"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine_module.why_no_gpu() is None


def test_the_first_line_names_the_device(tmp_path) -> None:
    lines = []
    run_suite(options(tmp_path, preflight=True), lines.append, [Sleep("x", 0.0)])
    assert lines[0].startswith("device: CPU, ") and lines[0].endswith("(the CPU was asked for)")
    assert "tests, sanitizer: not run on a CPU" in lines


@pytest.mark.parametrize(("load", "busy"), [(15.0, True), (0.5, False), (float("nan"), False)])
def test_a_busy_machine_is_told_everywhere(tmp_path, monkeypatch, load, busy) -> None:
    machine = dataclasses.replace(describe_machine(1), load_before=load, cores=4)
    monkeypatch.setattr(suite, "describe_machine", lambda *arguments: machine)
    lines = []
    result = run_suite(options(tmp_path), lines.append, [Sleep("x", 0.0)])
    told = "machine was busy when the run began, load 15.0 on 4 cores"
    assert result.store.machine["load_before"] == load or not busy
    for text in ("\n".join(lines), results_markdown(result.store)):
        assert (told in text) is busy


def test_a_backend_without_the_kernel_is_named(finished) -> None:
    _, result = finished
    (record,) = (record for record in result.store.records.values() if record.group == "epilogue")
    missing = {status.name for status in backends().backends} - {row.name for row in record.rows} - {"torch"}
    assert set(record.details["absent"]) == missing
    for name, why in record.details["absent"].items():
        assert f"Not in it: {name} ({why})." in results_markdown(result.store)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_explained(tmp_path, capsys) -> None:
    assert main.main(["--out", str(tmp_path), "--device", "cuda"]) == 2
    assert "device: expected auto or cpu on this machine, got 'cuda'" in capsys.readouterr().err


def test_the_document_states_the_limits_of_the_code() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = {cells[1].strip(): cells for line in page.splitlines() if len(cells := line.split("|")) == 5}

    def numbers(row: str, column: int) -> list[float]:
        return [float(found) for found in re.findall(r"\d(?:\.\d)?e-\d", rows[row][column])]

    assert numbers("row kernel, logits route", 2)[0] == KERNEL_LIMIT == numbers("`calibration_weights`", 2)[0]
    limits = [GRADIENT_LIMIT[dtype] for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert numbers("row kernel, logits route", 3) == limits
    assert numbers("`group_epilogue`", 3) == [epilogue._LIMIT]
    heads = {
        "head, fp32 inputs": rounding._OF_WIDE_INPUTS,
        "head, bf16 inputs, fp32 tile asked for": rounding._OF_WIDE_TILE,
        "head, bf16 inputs, any other tile": rounding._OF_NARROW_TILE,
    }
    for row, (loss, gradient) in heads.items():
        assert (numbers(row, 2), numbers(row, 3)) == ([loss], [gradient])


def test_only_takes_groups_and_parts_of_names(tmp_path) -> None:
    cases = catalogue.quick_cases()
    rows = options(tmp_path, only=("rows",)).select(cases)
    assert rows == [case for case in cases if case.group == "rows"]
    named = options(tmp_path, only=("frozen", "epilogue", "tests")).select(cases)
    assert {case.group for case in named} == {"head", "epilogue"} and len(named) == 4
    assert options(tmp_path, only=("tests",)).select(cases) == []
    assert options(tmp_path, only=("tests",)).wants_preflight("tests")
    assert not options(tmp_path, only=("head",)).wants_preflight("tests")


def test_catalogue_has_what_was_promised() -> None:
    cases = catalogue.gpu_cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    heads = {
        (case.shape.response_rows, case.shape.width, case.shape.vocab, case.kind, case.train_head, case.live)
        for case in cases
        if isinstance(case, HeadCase) and not (case.chunks or case.compiled or case.shape.prompt_tokens)
    }
    shapes = [(8192, 4096, 128256), (8192, 2304, 256000), (16384, 896, 151936), (4096, 4096, 32000)]
    variants = itertools.product(shapes, ("pairs", "lists of 4"), (True, False), (True, False))
    assert heads == {(*shape, *variant) for shape, *variant in variants}
    # What has a target comes before everything else.
    assert {case.group for case in cases[:7]} == {"ceilings", "head", "rows", "logits", "epilogue"}
    padded = [case.shape for case in cases if isinstance(case, HeadCase) and case.shape.prompt_tokens]
    assert [(shape.prompt_tokens / shape.tokens, shape.response_rows) for shape in padded] == [(0.5, 8192)]
    for case in catalogue.cpu_cases() + catalogue.quick_cases():
        assert case.cost > 0
    # Launch shapes are of Triton.
    assert {case.group for case in catalogue.cpu_cases()} == {case.group for case in cases} - {"shapes"}
    assert {case.group for case in cases} == set(report.GROUPS)


def test_a_tile_that_is_the_default_is_not_measured_twice() -> None:
    bf16 = {each.name: each.devices for each in choose("all") if each.ours}
    assert "cuda" not in bf16["ours_bf16_tile"] and {"cpu", "cuda"} == bf16["ours_fp32_tile"] == bf16["ours"]


@pytest.mark.parametrize("read_twice", [True, False], ids=["gradient", "logp"])
@pytest.mark.parametrize(("rows", "vocab"), [(2048, 128256), (1024, 256000), (64, 128256), (7, 31)])
def test_launch_shapes_are_tried_around_the_chosen_one(rows, vocab, read_twice) -> None:
    row_launch = pytest.importorskip("robust_dpo.kernels.row_launch", reason="needs Triton")
    chosen = row_launch.launch_shape(rows, vocab, 2, 132, read_twice=read_twice)
    shapes = shapes_around(chosen, 132)
    assert shapes[0] == chosen and len(set(shapes)) == len(shapes) <= 10
    assert {shape.threads for shape in shapes} == set(row_launch.THREADS)
    for shape in shapes:
        assert 1 <= shape.segments <= row_launch.MAX_SEGMENTS
        assert shape.segments == 1 or (shape.threads, shape.programs) == (row_launch.SPLIT_THREADS, None)
        assert shape.programs is None or (shape.programs > 0 and shape.threads == max(row_launch.THREADS))
    assert len({label(shape, chosen) for shape in shapes}) == len(shapes)


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "logp"])
def test_every_launch_shape_gives_the_right_results(gradient) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs the interpreter, which is for machines without a GPU")
    record = RowShapesCase(3, 20_011, gradient=gradient).measure(bench())
    assert record.complete and len(record.rows) > 6
    for row in record.rows:
        assert row.failure is None and row.seconds, f"{row.name}: {row.failure}"
    chosen = [row for row in record.rows if row.name.endswith("(chosen)")]
    assert len(chosen) == 1 and chosen[0].parameters["threads"] in (256, 512, 1024)
    assert set(record.rows[1].errors) == {"logp"} | ({"gradient"} if gradient else set())


def test_a_gpu_is_busy_and_its_cache_read_before_a_call_is_timed(monkeypatch) -> None:
    order = []

    class Event:
        def __init__(self, enable_timing) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, end) -> float:
            return 3.0

    class Buffer:
        def amax(self) -> None:
            order.append("read")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    assert Stopwatch(CPU)._between_events(lambda: order.append("call"), Buffer()) == 3e-3
    assert order == ["read", "sleep", "event", "call", "event", "wait"]


def test_epilogue_of_triton_agrees_in_the_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs the interpreter, which is for machines without a GPU")
    case, table = EpilogueCase(groups=3, tokens=10), bench()
    vectors = case._vectors(table)
    opened = case._candidate("triton", vectors, case._plain(vectors, torch.float64), table).open()
    assert opened.errors["gradient"] < 1e-5
    opened.run.prepare()
    opened.run.call()


@pytest.mark.parametrize(
    ("source", "status", "detail"),
    [
        ("def test_x(): pass", "passed", "1 passed, 0 failed, 0 errors, 1 skipped"),
        ("def test_x(): assert False, 'no'", "failed", "0 passed, 1 failed, 0 errors, 1 skipped"),
        ("import nothing_of_this_name", "failed", "1 errors"),
    ],
    ids=["passes", "fails", "does not import"],
)
def test_gpu_tests_are_counted(tmp_path, source, status, detail) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu: needs one', 'slow: long']\n")
    folder = tmp_path / "tests"
    folder.mkdir()
    marked = "import pytest\npytestmark = pytest.mark.gpu\n"
    (folder / "test_one.py").write_text(f"{marked}{source}\n@pytest.mark.skip\ndef test_skipped(): pass\n")
    outcome = run_tests(tmp_path, 60)
    assert outcome.status == status and detail in outcome.detail
    assert bool(outcome.output) == outcome.failed


def checkout_beside(folder: Path) -> Path:
    """A copy of the package's sources with one test, which tells where its process imports the package from."""
    shutil.copytree(package.ROOT / "robust_dpo", folder / "robust_dpo", ignore=shutil.ignore_patterns("*.so"))
    (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu: needs one']\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_one.py").write_text(f"""
import pathlib
import pytest, robust_dpo
pytestmark = pytest.mark.gpu
def test_package():
    assert pathlib.Path(robust_dpo.__file__).resolve().parents[1] == pathlib.Path({str(package.ROOT)!r})
""")
    return folder


def test_gpu_tests_of_a_checkout_run_on_the_package_that_is_measured(tmp_path) -> None:
    checkout = checkout_beside(tmp_path)
    outcome = run_tests(checkout, 60, marker="gpu")
    assert outcome.status == "passed" and outcome.detail.startswith("1 passed"), outcome


@pytest.mark.parametrize("change", ["differs", "is new", "is missing"])
def test_gpu_tests_of_another_package_are_refused(tmp_path, change) -> None:
    checkout = checkout_beside(tmp_path)
    path = checkout / "robust_dpo" / ("new.py" if change == "is new" else "dispatch.py")
    path.unlink() if change == "is missing" else path.write_text("x = 1")
    outcome = run_tests(checkout, 60, marker="gpu")
    assert outcome.status == "not run" and f"robust_dpo/{path.name} differs" in outcome.detail
    assert str(checkout) in outcome.detail and str(package.ROOT) in outcome.detail


def test_other_processes_import_the_same_package(tmp_path, monkeypatch) -> None:
    """Whatever lies in the folder that they start in."""
    (tmp_path / "robust_dpo").mkdir()
    (tmp_path / "robust_dpo" / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    (tmp_path / "probe.py").write_text("import sys, robust_dpo; print(robust_dpo.__file__, *sys.argv[1:])")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        package.module_command("probe", "--first", "second"),
        env=package.child_environment({"EXTRA": "1"}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(package.ROOT / "robust_dpo" / "__init__.py"), "--first", "second"]
    assert package.child_environment({"EXTRA": "1"})["PYTHONPATH"].split(os.pathsep)[0] == str(package.ROOT)


def test_gpu_tests_that_cannot_run_say_why(tmp_path) -> None:
    assert run_tests(tmp_path, 60).detail == "not a checkout: there are no tests"
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text("def test_without_the_marker(): pass\n")
    assert run_tests(tmp_path, 60, marker="not gpu").status == "passed"
    assert run_tests(tmp_path, 60, marker="gpu").detail == "no test is marked gpu"
    (tmp_path / "tests" / "test_one.py").write_text("import time\ntime.sleep(600)\n")
    assert run_tests(tmp_path, 2).detail.startswith("not finished after 2 seconds")


@pytest.mark.parametrize(("first", "status"), [("pass", "not finished"), ("assert False", "failed")])
def test_a_timeout_is_no_failure_but_a_failure_before_it_is_one(tmp_path, first, status) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu: needs one', 'slow: long']\n")
    folder = tmp_path / "tests"
    folder.mkdir()
    source = f"import pytest, time\npytestmark = pytest.mark.gpu\ndef test_one(): {first}\n"
    (folder / "test_one.py").write_text(f"{source}def test_two(): time.sleep(600)\n")
    started = time.monotonic()
    # Long enough for pytest to start on a machine that is busy with the rest of this suite.
    outcome = run_tests(tmp_path, 15)
    assert time.monotonic() - started < 60
    assert outcome.status == status and "not finished after 15 seconds" in outcome.detail
    assert f"{int(status != 'failed')} passed, {int(status == 'failed')} failed" in outcome.detail


def test_what_a_check_started_ends_with_it(tmp_path, monkeypatch) -> None:
    """compute-sanitizer runs the program it watches as its child."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\ntrap '' INT\nsleep 600 & echo $! > {tmp_path}/child; wait\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(preflight, "_GRACE_SECONDS", 0.5)
    outcome = run_sanitizer(1, str(tool))
    assert (outcome.status, outcome.detail) == ("not finished", "not finished after 1 seconds")
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    for _ in range(100):
        # Gone, or a zombie that nobody has waited for.
        if not child.exists() or child.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child lives on")


@pytest.mark.parametrize(("code", "status"), [(0, "passed"), (9, "failed"), (1, "failed")])
def test_sanitizer_is_asked_for_memcheck(tmp_path, code, status) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@" $PYTORCH_NO_CUDA_MEMORY_CACHING > {tmp_path}/asked\nexit {code}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    outcome = run_sanitizer(60, str(tool))
    assert outcome.status == status
    asked = (tmp_path / "asked").read_text()
    assert "--tool memcheck --error-exitcode 9" in asked and "robust_dpo.bench.smoke --device cuda 1" in asked


def test_a_failed_check_fails_the_run_but_not_the_measurements(tmp_path) -> None:
    machine = describe_machine(torch.get_num_threads(), CPU)
    store = Store(tmp_path, run_key(machine), machine)
    store.put_preflight("tests", {"status": "failed", "detail": "3 passed, 1 failed", "output": ""})
    result = run_suite(options(tmp_path), silent, [Sleep("x", 0.0)])
    assert result.failed and "x" in result.store.records
    assert "- tests: **failed** (3 passed, 1 failed)" in results_markdown(result.store)


def test_preflight_runs_once_and_within_its_share(tmp_path, monkeypatch) -> None:
    asked = []

    def check(*arguments):
        asked.append(arguments[-1])
        return suite.Outcome("passed", "fine")

    monkeypatch.setattr(suite, "run_tests", check)
    monkeypatch.setattr(suite, "run_sanitizer", check)
    machine = describe_machine(1)
    store = Store(tmp_path, run_key(machine), machine)
    for _ in range(2):
        suite._preflight(options(tmp_path), store, Budget(10), silent)
    assert len(asked) == 2 and 100 < asked[0] < 200 and 10 <= asked[1] < 100
    assert set(store.preflight) == {"tests", "sanitizer"}


def test_preflight_that_was_not_finished_is_tried_again(tmp_path, monkeypatch) -> None:
    outcomes = [suite.Outcome("not finished", "too slow"), suite.Outcome("passed", "fine")]
    monkeypatch.setattr(suite, "run_tests", lambda *arguments: outcomes.pop(0))
    monkeypatch.setattr(suite, "run_sanitizer", lambda timeout: suite.Outcome("not run", "no such tool"))
    machine = describe_machine(torch.get_num_threads(), CPU)
    store = Store(tmp_path, run_key(machine), machine)
    suite._preflight(options(tmp_path), store, Budget(10), silent)
    assert store.preflight["tests"]["status"] == "not finished"
    assert not run_suite(options(tmp_path), silent, []).failed
    suite._preflight(options(tmp_path), store, Budget(10), silent)
    assert store.preflight["tests"]["status"] == "passed" and not outcomes


def test_smoke_script_runs_every_operator() -> None:
    smoke.exercise(CPU)


@pytest.mark.parametrize("path", smoke.HEAD_PATHS, ids=lambda path: f"V={path.vocab}-{path.dtype}")
def test_smoke_paths_run_through_triton(path) -> None:
    if not backends()["triton"].usable:
        pytest.skip("Triton runs neither on this device nor interpreted")
    smoke.run_head(GPU_OR_CPU, path, "triton")


def test_smoke_shapes_reach_the_kernels_they_are_for() -> None:
    """A chip of 132 multiprocessors: H100, H200."""
    row_launch = pytest.importorskip("robust_dpo.kernels.row_launch", reason="needs Triton")
    kernel = importlib.import_module("robust_dpo.kernels.group_epilogue_triton")
    for itemsize, read_twice in itertools.product((2, 4), (True, False)):
        shape = row_launch.launch_shape(smoke.SPLIT_ROWS, smoke.SPLIT_VOCAB, itemsize, 132, read_twice=read_twice)
        assert shape.segments > 1
    assert smoke.MANY_TOKENS > kernel.ROWS_OF_LAST_PROGRAM
    rows = smoke.SEQUENCES * (smoke.TOKENS - smoke.PROMPT)
    assert rows > smoke.HEAD_CHUNK_ROWS >= smoke.TOKENS * max(path.group_size for path in smoke.HEAD_PATHS) / 2


def test_smoke_refuses_what_is_not_finite() -> None:
    smoke.require_finite("fine", torch.ones(2))
    for results in ((None,), (torch.ones(2), torch.tensor([1.0, float("nan")])), (torch.tensor(float("inf")),)):
        with pytest.raises(RuntimeError, match="x: a result is missing or not finite"):
            smoke.require_finite("x", *results)


def test_no_measurements_no_plots(tmp_path) -> None:
    assert draw({}, tmp_path) == []
    failed = Record("head x", "head", "x", [Row("ours", Role.OURS, failure="wrong")])
    assert draw({"head x": failed}, tmp_path) == []


def run_script(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", "--quick", "--minutes", "3", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_killed_run_goes_on_where_it_ended(tmp_path) -> None:
    arguments = ["--compare", "plain", "--only", "ceilings,head,rows"]
    results = tmp_path / "results.json"
    with subprocess.Popen(
        run_script(tmp_path, *arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if results.exists() and len(json.loads(results.read_text())["runs"][0]["cases"]) >= 2:
                break
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    before = json.loads(results.read_text())["runs"][0]["cases"]
    wanted = options(tmp_path, only=("ceilings", "head", "rows")).select(catalogue.quick_cases())
    assert 2 <= len(before) < len(wanted)
    done = subprocess.run(
        run_script(tmp_path, *arguments), env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(results.read_text())["runs"]
    assert set(run["cases"]) == {case.name for case in wanted}
    assert {name: run["cases"][name] for name in before} == before
    assert done.stdout.count("measured before") == len(before)
    assert (tmp_path / "results.md").exists() and (tmp_path / "head.png").exists()


@pytest.mark.parametrize("code", [0, 1], ids=["installs", "does not install"])
def test_the_script_installs_what_cannot_be_imported(monkeypatch, capsys, code) -> None:
    spec = importlib.util.spec_from_file_location("gpu_suite", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    asked = []

    def install(command, check):
        asked.append(command)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(script.subprocess, "run", install)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "peers")
    script.ensure_package()
    assert not asked
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    script.ensure_package()
    (command,) = asked
    assert command[1:] == ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    assert sys.path[0] == str(ROOT) and os.environ["PYTHONPATH"] == f"{ROOT}{os.pathsep}peers"
    assert ("could not be installed" in capsys.readouterr().err) == bool(code)


# Slow: the suite runs the quick GPU tests first, and this test runs the suite.
@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_quick_run_on_a_gpu(tmp_path) -> None:
    result = run_suite(options(tmp_path, device="cuda", minutes=4, preflight=False, compare=("all",)), silent)
    assert not result.failed, results_markdown(result.store)
    assert result.store.machine["accelerator"]["name"] == torch.cuda.get_device_name()
    rows = [row for record in result.store.records.values() for row in record.rows if row.role is Role.OURS]
    assert {row.memory_method for row in rows if row.extra_bytes is not None} == {"allocator"}
