"""The benchmark's own parts on toy sizes: problem and float64 solution, peers, measurements, tables."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PARTS = ("floor", "machine", "memory", "peers", "problem", "report", "session", "workers")


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    """The modules of benchmarks/headbench and the front end, which are not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        parts = {part: importlib.import_module(f"headbench.{part}") for part in PARTS}
        return SimpleNamespace(head_cpu=importlib.import_module("head_cpu"), **parts)


@pytest.fixture
def shape(bench: SimpleNamespace) -> object:
    return bench.problem.Shape(vocab=211, width=24, sequences=6, tokens=15)


def test_shape_counts_response_rows(shape) -> None:
    assert shape.response_rows == 6 * 8
    assert shape.product_flops == 2 * 48 * 24 * 211


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_solution_is_float64_autograd(bench, shape, dtype) -> None:
    problem = bench.problem.make_problem(shape, dtype, seed=3)
    assert (problem.targets != bench.problem.IGNORE).sum() == shape.response_rows
    solution = bench.problem.solve(problem, chunk_rows=7)
    hidden, weight = problem.hidden.double().requires_grad_(), problem.weight.double().requires_grad_()

    def logps(states, head):
        flat = F.cross_entropy((states @ head.t()).flatten(0, 1), problem.targets.flatten(), reduction="none")
        return -flat.view(problem.targets.shape).sum(1)

    ratios = logps(hidden, weight) - logps(problem.ref_hidden.double(), problem.ref_weight.double()).detach()
    loss = F.softplus(-problem.beta * (ratios[0::2] - ratios[1::2])).mean()
    loss.backward()
    torch.testing.assert_close(solution.loss, loss.detach())
    torch.testing.assert_close(solution.dhidden, hidden.grad)
    torch.testing.assert_close(solution.dweight, weight.grad)
    torch.testing.assert_close(solution.logps - solution.ref_logps, ratios.detach())


def test_problem_is_peaked_like_a_language_model(bench) -> None:
    shape = bench.problem.Shape(vocab=8192, width=128, sequences=4, tokens=256)
    problem = bench.problem.make_problem(shape, torch.float32, seed=11)
    mask = problem.targets != bench.problem.IGNORE
    logits = problem.hidden[mask].double() @ problem.weight.double().t()
    logps = logits.log_softmax(1).gather(1, problem.targets[mask][:, None])[:, 0]
    assert -3.5 < logps.mean() < -1.0
    assert logps.min() < -7
    assert logits.softmax(1).amax(1).median() > 0.2


def test_problem_depends_on_the_seed_only(bench, shape) -> None:
    one, same, other = (bench.problem.make_problem(shape, torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(one.hidden, same.hidden) and torch.equal(one.targets, same.targets)
    assert not torch.equal(one.hidden, other.hidden)


@pytest.mark.parametrize("mmap", [True, False])
def test_problem_survives_the_disk(bench, shape, tmp_path, mmap) -> None:
    problem = bench.problem.make_problem(shape, torch.bfloat16, seed=1)
    problem.save(tmp_path / "problem.pt")
    read = bench.problem.Problem.load(tmp_path / "problem.pt", mmap=mmap)
    for name, value in vars(problem).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(read, name))), name


EVERY_DTYPE = ("plain", "dora_authors", "trl", "liger", "ours")
BUDGETS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.mark.parametrize(
    "name, dtype",
    [(name, dtype) for dtype in BUDGETS for name in EVERY_DTYPE]
    + [("ours_fp32_tile", torch.bfloat16), ("ours_bf16_tile", torch.bfloat16)],
    ids=str,
)
def test_implementations_agree_with_float64(bench, shape, name, dtype) -> None:
    implementation, budget = bench.peers.IMPLEMENTATIONS[name], BUDGETS[dtype]
    if not implementation.available:
        pytest.skip(f"{implementation.package} is not installed")
    problem = bench.problem.make_problem(shape, dtype, seed=5)
    exact = bench.problem.solve(problem)
    bound = bench.peers.Bound.to(implementation, problem)
    loss = bound.step()
    dhidden, dweight = bound.gradients()
    error = bench.problem.relative_error
    assert error(loss, exact.loss) < budget
    assert error(dhidden.flatten(0, 1), exact.dhidden.flatten(0, 1)) < budget
    assert error(dweight, exact.dweight) < budget


def test_gradients_need_a_step(bench, shape) -> None:
    problem = bench.problem.make_problem(shape, torch.float32, seed=5)
    bound = bench.peers.Bound.to(bench.peers.IMPLEMENTATIONS["plain"], problem)
    with pytest.raises(RuntimeError, match="call step"):
        bound.gradients()


def test_relative_error_is_the_l2_ratio(bench) -> None:
    exact = torch.randn(5000, 3, dtype=torch.float64)
    got = exact + 1e-3 * torch.randn_like(exact)
    assert bench.problem.relative_error(got, exact) == pytest.approx(((got - exact).norm() / exact.norm()).item())


def test_floor_times_every_product(bench, shape) -> None:
    floor = bench.floor.Floor(bench.problem.make_problem(shape, torch.float32, seed=5))
    tried = floor.search(repeats=1)
    assert {choice.product for choice in tried} == set(bench.floor.TIMES_NEEDED) == set(floor.choices)
    for product, choice in floor.choices.items():
        assert choice.gflops == max(other.gflops for other in tried if other.product == product)
    assert floor.step() > 0


def test_floor_routes_compute_the_products(bench) -> None:
    torch.manual_seed(2)
    rows, tile, weight = torch.randn(9, 24), torch.randn(9, 211), torch.randn(211, 24)
    operands = bench.floor.Operands(
        rows, tile, weight, torch.empty_like(rows), torch.empty_like(tile), torch.empty_like(weight)
    )
    exact = {"logits": rows @ weight.t(), "dhidden": tile @ weight, "dweight": tile.t() @ rows}
    for route, products in bench.floor.ROUTES.items():
        for product, run in products(operands).items():
            got = run()
            got = got if got.shape == exact[product].shape else got.t()
            torch.testing.assert_close(got, exact[product], rtol=1e-4, atol=1e-4, msg=f"{route}: {product}")


@pytest.mark.parametrize("resettable", [True, False], ids=["high-water mark", "sampled"])
def test_peak_memory_sees_a_temporary(bench, monkeypatch, tmp_path, resettable) -> None:
    if not resettable:
        monkeypatch.setattr(bench.memory, "_CLEAR_REFS", tmp_path)  # a folder cannot be written to
    before = bench.memory.resident_bytes()

    def allocate() -> None:
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
        for _ in range(20):
            block.add_(1)

    peak, method = bench.memory.peak_bytes(allocate)
    assert 56 * 2**20 < peak - before < 96 * 2**20, method


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
def test_bad_arguments_are_explained(bench, capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.head_cpu.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_arguments_choose_by_dtype(bench) -> None:
    options = bench.head_cpu.parse(["--only", "plain,ours_fp32_tile", "--dtype", "fp32,bf16"])
    assert options.names == {torch.float32: ["plain"], torch.bfloat16: ["plain", "ours_fp32_tile"]}


@pytest.fixture
def section(bench) -> object:
    row = bench.report.Row
    return bench.report.Section(
        dtype="float32",
        rows=[
            row("plain", "float32", [4.0, 6.0, 5.0], 3 * 2**30, "high-water mark", 1e-6, 2e-6, 3e-6, 7.0),
            row("ours", "float32", [2.5, 2.0, 2.25], 2**29, "high-water mark", 1e-7, 2e-7, 3e-7, 2.5),
            row("cce", "float32", failure="exit code 1"),
        ],
        floor=row("gemms", "float32", [1.5, 1.5, 1.5]),
        floor_choices=[{"product": "logits", "route": "mm", "chunk": 512, "gflops": 300.0}],
        floor_tried=[],
        product_flops=10**12,
        data={"token_logp_mean": -2.5, "loss": 0.6, "margins": [0.1]},
    )


def test_table_has_ratios_and_order(bench, section) -> None:
    text = bench.report.markdown_table(section)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert list(table) == ["gemms", "ours", "plain", "cce"]
    plain = table["plain"]
    assert plain["time, s: median [min–max]"] == "5.000 [4.000–6.000]"
    assert plain["× floor"] == "3.33"
    assert plain["GFLOP/s"] == "800"
    assert plain["extra memory, GiB"] == "3.00"
    assert plain["ours ÷ it, time"] == "0.45"
    assert plain["ours ÷ it, memory"] == "0.17"
    assert plain["dhidden error"] == "2.0e-06"
    assert table["ours"]["ours ÷ it, time"] == "" and table["ours"]["× floor"] == "1.50"
    assert table["cce"]["time, s: median [min–max]"] == "failed (exit code 1)"


def test_markdown_names_the_machine(bench, section) -> None:
    machine = bench.machine.describe_machine(threads=3)
    sizes = {"vocab": 5, "width": 4, "sequences": 2, "tokens": 3, "response_rows": 4}
    text = bench.report.markdown(machine, sizes, 3, [section])
    assert machine.cpu in text and "3 threads" in text and f"torch {machine.versions['torch']}" in text
    assert "logits: mm, 512 rows, 300 GFLOP/s" in text


def test_docs_are_replaced_between_markers(bench, tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- t:begin -->\nold\n<!-- t:end -->\nafter\n")
    for text in ("new", "newer"):
        bench.report.replace_between(page, "t", text)
        assert page.read_text() == f"before\n<!-- t:begin -->\n\n{text}\n\n<!-- t:end -->\nafter\n"


@pytest.mark.parametrize(
    "content",
    ["", "<!-- t:begin -->", "<!-- t:end --> <!-- t:begin -->", "<!-- t:begin --><!-- t:begin --><!-- t:end -->"],
    ids=["none", "no end", "wrong order", "twice"],
)
def test_docs_without_markers_are_refused(bench, tmp_path, content) -> None:
    page = tmp_path / "page.md"
    page.write_text(content)
    with pytest.raises(ValueError, match=r"page\.md: expected <!-- t:begin -->"):
        bench.report.replace_between(page, "t", "new")
    assert page.read_text() == content


def test_docs_page_has_the_markers(bench, tmp_path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((BENCHMARKS.parent / "docs" / "benchmarks.md").read_text())
    bench.report.replace_between(page, bench.head_cpu.MARKER, "table")
    assert "table" in page.read_text()


def test_a_dead_worker_is_reported(bench, tmp_path) -> None:
    worker = bench.workers.Worker("memory", 1, "plain", tmp_path / "missing.pt")
    with pytest.raises(bench.workers.WorkerError, match="exit code 1"):
        worker.receive()
    worker.stop()


def test_the_command_measures_and_writes(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- head_cpu:begin -->\n<!-- head_cpu:end -->\n")
    sizes = ["--vocab", "300", "--width", "32", "--sequences", "2", "--tokens", "16"]
    command = [sys.executable, str(BENCHMARKS / "head_cpu.py"), "--only", "plain", "--dtype", "fp32", "--rounds", "3"]
    result = subprocess.run(
        [*command, *sizes, "--threads", "1", "--out", str(tmp_path / "out"), "--docs", str(page)],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out" / "head_cpu.json").read_text())
    (measured,) = record["sections"]
    (row,) = measured["rows"]
    assert row["name"] == "plain" and len(row["seconds"]) == 3 and len(measured["floor"]["seconds"]) == 3
    assert row["failure"] is None and row["dweight_error"] < 1e-5 and math.isfinite(row["extra_bytes"])
    assert record["machine"]["threads"] == 1
    assert "| plain |" in page.read_text() and "| plain |" in (tmp_path / "out" / "head_cpu.md").read_text()
