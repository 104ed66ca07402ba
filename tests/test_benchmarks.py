"""The head benchmark on toy sizes: problem and exact solution, implementations, measurements, tables, its command."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import robust_dpo
from robust_dpo.bench import memory, tables
from robust_dpo.bench.compare import wrong_results
from robust_dpo.bench.floor import PRODUCTS, Floor, Operands, routes
from robust_dpo.bench.implementation import Bound
from robust_dpo.bench.machine import describe_machine
from robust_dpo.bench.problem import IGNORE, Problem, Shape, group_loss, make_problem
from robust_dpo.bench.processes import main as head_cpu
from robust_dpo.bench.processes.workers import Worker, WorkerError, measure_memory
from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.registry import IMPLEMENTATIONS
from robust_dpo.bench.rounding import Rounding, head_limits, rounding_of_logits
from robust_dpo.bench.solution import relative_error, solve, token_logps
from robust_dpo.bench.timing import Run, Stopwatch, in_turns

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")
SHAPE = Shape(vocab=211, width=24, sequences=8, tokens=15)
# Many tiny operators: see the fixture.
pytestmark = pytest.mark.usefixtures("one_thread")


def reference_loss(problem: Problem, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The problem's loss in float64 with whole logits; Plackett-Luce by its definition, one choice at a time."""

    def logps(states, head):
        flat = F.cross_entropy((states @ head.t()).flatten(0, 1), problem.targets.flatten(), reduction="none")
        return -flat.view(problem.targets.shape).sum(1)

    if problem.ref_logps is None:
        ref_logps = logps(problem.ref_hidden.double(), problem.ref_weight.double()).detach()
    else:
        ref_logps = problem.ref_logps.double()
    ratios = (logps(hidden, weight) - ref_logps).view(-1, problem.group_size)
    if problem.group_size == 2:
        return F.softplus(-problem.beta * (ratios[:, 0] - ratios[:, 1])).mean()
    terms = [-torch.log_softmax(problem.beta * group[k:], 0)[0] for group in ratios for k in range(problem.group_size)]
    return torch.stack(terms).mean()


def test_shape_counts_response_rows() -> None:
    assert SHAPE.response_rows == 8 * 8
    assert dataclasses.replace(SHAPE, prompt=0).response_rows == 8 * 15
    assert SHAPE.product_flops == 2 * 64 * 24 * 211


@pytest.mark.parametrize("live", [True, False], ids=["live", "cached"])
@pytest.mark.parametrize("group_size", [2, 4], ids=["pairs", "lists"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_solution_is_float64_autograd(dtype, group_size, live) -> None:
    problem = make_problem(dataclasses.replace(SHAPE, group_size=group_size), dtype, seed=3)
    assert (problem.targets != IGNORE).sum() == SHAPE.response_rows
    tokens = token_logps(problem)
    if not live:
        problem = problem.with_cached_reference(tokens.per_sequence(tokens.ref_logp))
    solution = solve(problem, tokens)
    hidden, weight = problem.hidden.double().requires_grad_(), problem.weight.double().requires_grad_()
    loss = reference_loss(problem, hidden, weight)
    loss.backward()
    torch.testing.assert_close(solution.loss, loss.detach())
    torch.testing.assert_close(solution.dhidden, hidden.grad.flatten(0, 1))
    torch.testing.assert_close(solution.dweight, weight.grad)
    assert solution.errors(loss.detach(), hidden.grad, weight.grad)["dweight"] < 1e-12


def test_part_of_a_solution_is_a_part_of_the_whole() -> None:
    problem = make_problem(SHAPE, torch.float32, seed=4)
    whole, part = solve(problem), solve(problem, max_rows=5, max_tokens=20)
    assert len(part.rows) == 5 and 10 <= len(part.tokens) <= 20
    torch.testing.assert_close(part.dhidden, whole.dhidden[part.rows])
    torch.testing.assert_close(part.dweight, whole.dweight[part.tokens])
    assert torch.isin(part.tokens, problem.targets[problem.targets != IGNORE].unique()).sum() >= 10


def test_cross_entropy_solution_is_autograd() -> None:
    problem = make_problem(SHAPE, torch.float32, seed=4)
    solution = solve(problem, objective="cross_entropy")
    hidden, weight = problem.hidden.double().requires_grad_(), problem.weight.double().requires_grad_()
    loss = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), problem.targets.flatten())
    loss.backward()
    assert max(solution.errors(loss.detach(), hidden.grad, weight.grad).values()) < 1e-12


def test_group_loss_of_two_in_a_list_is_half_of_the_pair() -> None:
    logps, ref_logps = torch.randn(2, 8, dtype=torch.float64)
    pair = group_loss(logps, ref_logps, 0.3, 2)
    t = 0.3 * (logps - ref_logps).view(-1, 2)
    torch.testing.assert_close(-F.log_softmax(t, 1)[:, 0].mean(), pair)


def test_problem_is_peaked_like_a_language_model() -> None:
    shape = Shape(vocab=8192, width=128, sequences=4, tokens=256)
    problem = make_problem(shape, torch.float32, seed=11)
    mask = problem.targets != IGNORE
    logits = problem.hidden[mask].double() @ problem.weight.double().t()
    logps = logits.log_softmax(1).gather(1, problem.targets[mask][:, None])[:, 0]
    assert -3.5 < logps.mean() < -1.0
    assert logps.min() < -7
    assert logits.softmax(1).amax(1).median() > 0.2


def test_problem_depends_on_the_seed_only() -> None:
    one, same, other = (make_problem(SHAPE, torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(one.hidden, same.hidden) and torch.equal(one.targets, same.targets)
    assert not torch.equal(one.hidden, other.hidden)


@pytest.mark.parametrize("mmap", [True, False])
def test_problem_survives_the_disk(tmp_path, mmap) -> None:
    problem = make_problem(SHAPE, torch.bfloat16, seed=1)
    problem.save(tmp_path / "problem.pt")
    read = Problem.load(tmp_path / "problem.pt", mmap=mmap)
    for name, value in vars(problem).items():
        if value is None:
            assert getattr(read, name) is None
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(read, name))), name


EVERY_DTYPE = ("plain", "dora_authors", "trl", "liger", "ours", "ours_torch")
BUDGETS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("variant", ["pairs, live", "pairs, cached", "lists, live, frozen head"])
@pytest.mark.parametrize(
    "name, dtype",
    [(name, dtype) for dtype in BUDGETS for name in EVERY_DTYPE]
    + [("ours_fp32_tile", torch.bfloat16), ("ours_bf16_tile", torch.bfloat16)],
    ids=str,
)
def test_implementations_agree_with_float64(name, dtype, variant) -> None:
    implementation, budget = IMPLEMENTATIONS[name], BUDGETS[dtype]
    if not implementation.available:
        pytest.skip(f"{implementation.package} is not installed")
    problem = make_problem(SHAPE, dtype, seed=5)
    tokens = token_logps(problem)
    if "lists" in variant:
        problem = dataclasses.replace(problem, group_size=4, train_head=False)
    if "cached" in variant:
        problem = problem.with_cached_reference(tokens.per_sequence(tokens.ref_logp))
    if obstacle := implementation.obstacle(problem):
        assert name == "liger" and variant != "pairs, live", obstacle
        return
    exact = solve(problem, tokens)
    bound = Bound.to(implementation, problem)
    loss = bound.step()
    dhidden, dweight = bound.gradients()
    errors = exact.errors(loss, dhidden, dweight)
    assert set(errors) == {"loss", "dhidden", "dweight"} - ({"dweight"} if "frozen" in variant else set())
    assert max(errors.values()) < budget


@pytest.mark.parametrize("live", [True, False], ids=["live", "cached"])
@pytest.mark.parametrize("group_size", [2, 4], ids=["pairs", "lists"])
def test_rounding_of_logits_is_foreseen(group_size, live) -> None:
    """Errors of PyTorch with a bf16 tile, over several problems, are as large as expected, and within the limits."""
    plain, shape = IMPLEMENTATIONS["plain"], Shape(2048, 64, 8, 64, prompt=0, group_size=group_size)
    losses, gradients = [], []
    for seed in range(6):
        problem = make_problem(shape, torch.bfloat16, seed)
        tokens = token_logps(problem)
        if not live:
            problem = problem.with_cached_reference(tokens.per_sequence(tokens.ref_logp))
        expected = rounding_of_logits(problem, tokens, torch.bfloat16)
        bound = Bound.to(plain, problem)
        errors = solve(problem, tokens).errors(bound.step(), *bound.gradients())
        assert wrong_results(errors, head_limits(plain, torch.bfloat16, expected)) is None
        losses.append(errors["loss"] / expected.loss)
        gradients.append(max(errors["dhidden"], errors["dweight"]) / expected.gradient)
    assert 0.2 < (sum(ratio**2 for ratio in losses) / len(losses)) ** 0.5 < 2
    assert min(gradients) > 0.2 and max(gradients) < 1


@pytest.mark.parametrize(
    ("name", "dtype", "limits"),
    [
        ("plain", torch.float32, (1e-3, 1e-3)),
        ("ours_fp32_tile", torch.bfloat16, (1e-3, 5e-3)),
        ("plain", torch.bfloat16, (1.5e-2, 3e-2)),
        ("ours", torch.bfloat16, (1.5e-2, 3e-2)),
    ],
    ids=str,
)
def test_limits_follow_the_tile(name, dtype, limits) -> None:
    loss, gradient = limits
    small = head_limits(IMPLEMENTATIONS[name], dtype, Rounding(1e-4, 1e-4))
    assert small == {"loss": loss, "dhidden": gradient, "dweight": gradient}
    large = head_limits(IMPLEMENTATIONS[name], dtype, Rounding(1e-2, 4e-2))
    assert (large == small) == (loss < 1e-2)


def test_obstacles_name_the_reason() -> None:
    problem = make_problem(SHAPE, torch.float32, seed=5)
    assert "bfloat16" not in (IMPLEMENTATIONS["plain"].obstacle(problem) or "")
    assert "float32" in (IMPLEMENTATIONS["ours_bf16_tile"].obstacle(problem) or "")
    assert "cuda, not on cpu" in (IMPLEMENTATIONS["quack_mean_ce"].obstacle(problem) or "")
    assert "groups of 4" in (IMPLEMENTATIONS["liger"].obstacle(dataclasses.replace(problem, group_size=4)) or "")


def test_gradients_need_a_step() -> None:
    problem = make_problem(SHAPE, torch.float32, seed=5)
    bound = Bound.to(IMPLEMENTATIONS["plain"], problem)
    with pytest.raises(RuntimeError, match="call step"):
        bound.gradients()


def test_relative_error_is_the_l2_ratio() -> None:
    exact = torch.randn(5000, 3, dtype=torch.float64)
    got = exact + 1e-3 * torch.randn_like(exact)
    assert relative_error(got, exact) == pytest.approx(((got - exact).norm() / exact.norm()).item())
    zero = torch.zeros(3)
    assert relative_error(zero, zero) == 0 and relative_error(zero + 1, zero) == math.inf
    assert math.isnan(relative_error(torch.full((3,), float("nan")), zero + 1))


@pytest.mark.parametrize("chunks", [(7,), (16, 64)], ids=["with a rest", "whole"])
def test_floor_runs_every_product_over_all_rows(monkeypatch, chunks) -> None:
    problem = make_problem(SHAPE, torch.float32, seed=5)
    floor = Floor(problem, chunks)
    tried = floor.search(Stopwatch(CPU), repeats=1)
    assert {choice.product for choice in tried} == set(PRODUCTS) == set(floor.choices)
    for product, choice in floor.choices.items():
        assert choice.gflops == max(other.gflops for other in tried if other.product == product)
        calls = floor._plan(choice)
        rows = sum(times * len(operand_rows(call)) for call, times in calls)
        assert rows == SHAPE.response_rows * floor.times[product]
    assert floor.times == {"logits": 2, "dhidden": 1, "dweight": 1}
    assert floor.flops == 4 * SHAPE.product_flops
    floor.step()


def operand_rows(call) -> torch.Tensor:
    """The rows that a product of the floor works on, out of its closure."""
    cells = [cell.cell_contents for cell in call.__closure__]
    operands = [cell for cell in cells if isinstance(cell, Operands)]
    return operands[0].rows if operands else next(cell.t() for cell in cells if isinstance(cell, torch.Tensor))


def test_floor_leaves_out_what_is_not_needed() -> None:
    problem = dataclasses.replace(make_problem(SHAPE, torch.float32, seed=5), train_head=False)
    cached = problem.with_cached_reference(torch.zeros(SHAPE.sequences))
    assert Floor(cached, (64,)).times == {"logits": 1, "dhidden": 1, "dweight": 0}
    assert Floor(cached, (64,)).flops == 2 * SHAPE.product_flops


def test_floor_routes_compute_the_products() -> None:
    torch.manual_seed(2)
    rows, tile, weight = torch.randn(9, 24), torch.randn(9, 211), torch.randn(211, 24)
    operands = Operands(rows, tile, weight, torch.empty_like(rows), torch.empty_like(tile), torch.empty_like(weight))
    exact = {"logits": rows @ weight.t(), "dhidden": tile @ weight, "dweight": tile.t() @ rows}
    for route, products in routes(CPU).items():
        for product, run in products(operands).items():
            got = run()
            got = got if got.shape == exact[product].shape else got.t()
            torch.testing.assert_close(got, exact[product], rtol=1e-4, atol=1e-4, msg=f"{route}: {product}")


def test_turns_rotate_and_prepare_is_not_timed() -> None:
    order = []
    runs = {
        name: Run(lambda name=name: order.append(name), lambda name=name: order.append(f"prepare {name}"))
        for name in "abc"
    }
    seconds = in_turns(runs, Stopwatch(CPU), rounds=3, warmups=0)
    assert [name for name in order if len(name) == 1] == list("abcbcacab")
    assert order[:2] == ["prepare a", "a"]
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize(
    ("times", "rounds"),
    [({"enough": 2}, 3), ({"enough": 6}, 6), ({"deadline": 0}, 1), ({"deadline": 2}, 2), ({}, 20)],
    ids=str,
)
def test_turns_end_with_the_time(times, rounds) -> None:
    """The clock shows how many calls there were."""
    calls = []
    runs = {"a": Run(lambda: calls.append(1))}
    seconds = in_turns(runs, Stopwatch(CPU), rounds=20, warmups=0, clock=lambda: len(calls), **times)
    assert len(seconds["a"]) == rounds == len(calls)


def test_there_is_no_warm_up_without_time() -> None:
    calls = []
    runs = {"a": Run(lambda: calls.append(1))}
    in_turns(runs, Stopwatch(CPU), rounds=1, warmups=5, enough=2, clock=lambda: len(calls))
    assert len(calls) == 3


@pytest.mark.parametrize("resettable", [True, False], ids=["high-water mark", "sampled"])
def test_peak_memory_sees_a_temporary(monkeypatch, tmp_path, resettable) -> None:
    if not resettable:
        monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path)  # a folder cannot be written to

    def allocate() -> None:
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
        for _ in range(20):
            block.add_(1)

    found = memory.extra_bytes(allocate, CPU)
    assert found is not None and 56 * 2**20 < found[0] < 96 * 2**20, found


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dtype", "fp8"], "expected names out of fp32, bf16, got fp8"),
        (["--rounds", "0"], "expected a number of at least 1, got 0"),
        (["--threads", "none"], "invalid _positive value: 'none'"),
        (["--sequences", "3"], "expected an even number (pairs), got 3"),
        (["--tokens", "1"], "expected at least 2 (half are response), got 1"),
        (["--only", "plain,fast"], "got fast"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_explained(capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as stop:
        head_cpu.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_arguments_choose_by_dtype() -> None:
    options = head_cpu.parse(["--only", "plain,ours_fp32_tile", "--dtype", "fp32,bf16"])
    names = {dtype: [each.name for each in chosen] for dtype, chosen in options.implementations.items()}
    assert names == {torch.float32: ["plain"], torch.bfloat16: ["plain", "ours_fp32_tile"]}


@pytest.fixture
def record() -> Record:
    errors = {"loss": 1e-6, "dhidden": 2e-6, "dweight": 3e-6}
    memory_method = "high-water mark"
    return Record(
        name="head float32",
        group="head",
        title="float32",
        rows=[
            Row("plain", Role.PEER, [4.0, 6.0, 5.0], 7.0, 3 * 2**30, memory_method, errors),
            Row("ours", Role.OURS, [2.5, 2.0, 2.25], 2.5, 2**29, memory_method, {"loss": 1e-7}),
            Row("other", Role.PEER, [2.0], note="cross-entropy instead"),
            Row("cce", failure="exit code 1"),
            Row("gemms", Role.FLOOR, [1.5, 1.5, 1.5]),
        ],
        flops=4 * 10**12,
        input_bytes=2**30,
        bound_bytes=3 * 2**29,
        details={
            "floor_choices": [{"product": "logits", "route": "mm", "chunk": 512, "gflops": 300.0}],
            "data": {"token_logp_mean": -2.5, "loss": 0.6},
        },
    )


def test_table_has_ratios_and_order(record) -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.markdown_table(record).splitlines()]
    table = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert list(table) == ["gemms", "other (cross-entropy instead)", "ours", "plain", "cce"]
    plain, ours = table["plain"], table["ours"]
    assert plain["time, ms: median [min–max]"] == "5000 [4000–6000]"
    assert plain["× floor"] == "3.33"
    assert plain["rate"] == "800 GFLOP/s"
    assert plain["extra memory, GiB"] == "3" and plain["peak, GiB"] == "4" and plain["× bound"] == ""
    assert plain["time, × ours"] == "2.22"
    assert plain["memory, × ours"] == "6.00"
    assert plain["dhidden error"] == "2.0e-06"
    assert ours["time, × ours"] == "" and ours["× floor"] == "1.50" and ours["× bound"] == "1.00"
    assert table["cce"]["time, ms: median [min–max]"] == "failed: exit code 1"
    assert "logp error" not in lines[0]  # a column that nobody fills is left out


def test_terminal_table_fits_and_explains(record) -> None:
    console = Console(width=80, no_color=True, record=True, file=io.StringIO())
    console.print(tables.rich_table(record))
    text = console.export_text()
    (plain,) = (line.split() for line in text.splitlines() if line.strip().startswith("plain "))
    assert plain == ["plain", "5000", "40%", "3.33", "800", "GFLOP/s", "3.000", "2.22", "3e-06"]
    assert "cce: exit code 1" in text and "other: cross-entropy instead" in text


def test_floor_of_a_sweep_is_the_one_of_the_same_chunk() -> None:
    rows = [
        Row(name, role, [seconds], parameters={"chunk": chunk})
        for chunk, floor, ours in ((8, 1.0, 3.0), (16, 2.0, 3.0))
        for name, role, seconds in (("gemms", Role.FLOOR, floor), ("ours", Role.OURS, ours))
    ]
    sweep = Record("sweep", "chunks", "sweep", rows)
    assert [sweep.floor_of(row).median for row in rows if row.role is Role.OURS] == [1.0, 2.0]


def test_record_survives_json(record) -> None:
    assert Record.from_dict(json.loads(json.dumps(record.as_dict()))) == record


def test_markdown_names_the_machine(record) -> None:
    machine = describe_machine(threads=3)
    sizes = {"vocab": 5, "width": 4, "sequences": 2, "tokens": 3, "response_rows": 4}
    text = tables.head_markdown(machine, sizes, 3, [record])
    assert machine.cpu in text and "3 threads" in text and f"torch {machine.versions['torch']}" in text
    assert "logits: mm, 512 rows, 300 GFLOP/s" in text


def test_docs_are_replaced_between_markers(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- t:begin -->\nold\n<!-- t:end -->\nafter\n")
    for text in ("new", "newer"):
        tables.replace_between(page, "t", text)
        assert page.read_text() == f"before\n<!-- t:begin -->\n\n{text}\n\n<!-- t:end -->\nafter\n"


@pytest.mark.parametrize(
    "content",
    ["", "<!-- t:begin -->", "<!-- t:end --> <!-- t:begin -->", "<!-- t:begin --><!-- t:begin --><!-- t:end -->"],
    ids=["none", "no end", "wrong order", "twice"],
)
def test_docs_without_markers_are_refused(tmp_path, content) -> None:
    page = tmp_path / "page.md"
    page.write_text(content)
    with pytest.raises(ValueError, match=r"page\.md: expected <!-- t:begin -->"):
        tables.replace_between(page, "t", "new")
    assert page.read_text() == content


def test_docs_page_has_the_markers(tmp_path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((BENCHMARKS.parent / "docs" / "benchmarks.md").read_text())
    tables.replace_between(page, head_cpu.MARKER, "table")
    assert "table" in page.read_text()


def test_a_dead_worker_is_reported(tmp_path) -> None:
    worker = Worker(measure_memory, 1, "plain", tmp_path / "missing.pt")
    with pytest.raises(WorkerError, match="exit code 1"):
        worker.receive()
    worker.stop()


def test_the_command_measures_and_writes(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- head_cpu:begin -->\n<!-- head_cpu:end -->\n")
    sizes = ["--vocab", "300", "--width", "32", "--sequences", "2", "--tokens", "16"]
    command = [sys.executable, str(BENCHMARKS / "head_cpu.py"), "--only", "plain", "--dtype", "fp32", "--rounds", "3"]
    result = subprocess.run(
        [*command, *sizes, "--threads", "1", "--out", str(tmp_path / "out"), "--docs", str(page)],
        env={**os.environ, "PYTHONPATH": str(Path(robust_dpo.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out" / "head_cpu.json").read_text())
    (measured,) = content["records"]
    plain, floor = measured["rows"]
    assert plain["name"] == "plain" and len(plain["seconds"]) == 3 and len(floor["seconds"]) == 3
    assert plain["failure"] is None and plain["errors"]["dweight"] < 1e-5 and math.isfinite(plain["extra_bytes"])
    assert content["machine"]["threads"] == 1
    assert "| plain |" in page.read_text() and "| plain |" in (tmp_path / "out" / "head_cpu.md").read_text()


def run_microbenchmarks(*arguments: str) -> str:
    sizes = ["--vocab", "64", "--width", "8", "--tokens", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-q", "-rs", *sizes, *arguments],
        cwd=BENCHMARKS.parent,
        # What this pytest tells its own workers is not for that one: under xdist it would not measure.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_microbenchmarks_name_the_device() -> None:
    ids = [line for line in run_microbenchmarks("--collect-only").splitlines() if "::" in line]
    assert ids and all(("cpu" in name) != ("gpu" in name) for name in ids)
    operators = ("row_logprob", "group_epilogue", "calibration_weights", "head", "sequence_logps", "preference_loss")
    for operator, device in ((operator, device) for operator in operators for device in ("cpu", "gpu")):
        assert any(f"::test_{operator}[" in name and device in name for name in ids), (operator, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_microbenchmarks_of_a_missing_gpu_are_skipped() -> None:
    output = run_microbenchmarks("--benchmark-only", "-k", "(cpu or gpu) and (preference_loss or row_logprob)")
    assert "there is no GPU that this torch can use" in output
    assert "test_preference_loss[cpu-mean]" in output and "test_row_logprob[cpu-plain-float32-logp]" in output
