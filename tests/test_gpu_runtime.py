"""What CUDA does around the operators: nothing waits, graphs replay, streams do not meet, memory has its bounds."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu_cases import BACKENDS, DEVICE, KL, needs_cuda, on_the_device, solve, there, tokens
from problems import Problem, relative_error, require_backend
from torch import Tensor

from robust_dpo import linear_preference_loss, sequence_logps_from_logits
from robust_dpo.ops import gemm
from robust_dpo.ops.host import DeviceCopies

pytestmark = [*on_the_device, needs_cuda]
OPTIONS = {"chunk_bytes": 64 * 1009}
# A millisecond or so on any GPU, in cycles.
A_WHILE = 2_000_000


@pytest.fixture
def restored_sync_mode() -> Iterator[None]:
    """Lets the next test wait for the GPU again."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def own_loss(groups: Any) -> Tensor:
    """DPO as a user would write it: no kernel knows it."""
    return -torch.nn.functional.logsigmoid(0.1 * (groups.log_ratios[:, 0] - groups.log_ratios[:, 1]))


def packed_problem(**options: Any) -> Problem:
    """Nothing of it has to be read on the host."""
    return there(tokens([2] * 8, torch.bfloat16, calibration=True, packed=True, **options))


def renew(problem: Problem) -> None:
    """Other numbers in the same memory."""
    with torch.no_grad():
        for leaf in problem.leaves.values():
            leaf.copy_(torch.randn_like(leaf) / 8)
        problem.kwargs["ref_logps"].copy_(-30 * torch.rand_like(problem.kwargs["ref_logps"]))


def captured(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of a step that has run before, and its results, which are other numbers after each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def assert_same_bits(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for place, (ours, theirs) in enumerate(zip(found, right, strict=True)):
        assert torch.equal(ours, theirs), f"result {place}"


@pytest.mark.parametrize("source", ["cached", "live"])
@pytest.mark.parametrize("loss", ["sigmoid", own_loss], ids=["sigmoid", "own"])
@pytest.mark.usefixtures("restored_sync_mode")
def test_nothing_waits_for_the_gpu(source: str, loss: Any) -> None:
    problem = packed_problem(reference=source)
    solve(problem, loss=loss, **OPTIONS)  # compiles kernels and sends the layout
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    solve(problem, loss=loss, **OPTIONS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_capture_into_a_graph(backend: str) -> None:
    require_backend(backend)
    problem = packed_problem(reference="cached")
    graph, results = captured(lambda: solve(problem, backend=backend, **OPTIONS))
    for _ in range(3):
        renew(problem)
        graph.replay()
        replayed = tuple(each.clone() for each in results)
        assert_same_bits(replayed, solve(problem, backend=backend, **OPTIONS))


def test_a_graph_outlives_the_layouts_of_other_calls() -> None:
    """It reads offsets at addresses of copies that are kept for a while only, unless a graph has them."""
    problem = packed_problem(reference="cached")
    graph, results = captured(lambda: solve(problem, **OPTIONS))
    others = 300
    assert others > inspect.signature(DeviceCopies).parameters["size"].default
    hidden, weight = (torch.randn(rows, 64, device=DEVICE, dtype=torch.bfloat16) for rows in (others + 2, 1009))
    targets, ref_logps = torch.randint(1009, (others + 2,), device=DEVICE), torch.full((2,), -9.0, device=DEVICE)
    for first in range(1, others + 1):
        seq_lens = torch.tensor([first, others + 2 - first])
        linear_preference_loss(hidden, weight, targets, seq_lens=seq_lens, ref_logps=ref_logps)
    torch.cuda.synchronize()
    # Whatever was freed is now somebody else's.
    squatters = [torch.full((size,), -1, device=DEVICE) for size in range(1, 65) for _ in range(32)]
    for _ in range(3):
        renew(problem)
        graph.replay()
        replayed = tuple(each.clone() for each in results)
        assert_same_bits(replayed, solve(problem, **OPTIONS))
    assert all(bool((each == -1).all()) for each in squatters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_at_the_same_time(backend: str) -> None:
    require_backend(backend)
    problems = [there(tokens([2] * 16, torch.bfloat16, calibration=True)) for _ in range(2)]
    alone = [solve(problem, backend=backend, **OPTIONS) for problem in problems]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(10):
        together = []
        for problem, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                together.append(solve(problem, backend=backend, **OPTIONS))
        torch.cuda.synchronize()
        for found, right in zip(together, alone, strict=True):
            assert_same_bits(found, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_does_not_read_what_another_one_is_still_copying(backend: str) -> None:
    """Both use a layout for the first time, the second one while the first is busy; nobody waits on the host."""
    require_backend(backend)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(5):
        problem = packed_problem(reference="cached")
        for stream in (first, second):
            stream.wait_stream(torch.cuda.current_stream())
        found = []
        with torch.cuda.stream(first):
            torch.cuda._sleep(10 * A_WHILE)
            found.append(solve(problem, backend=backend, **OPTIONS))
        with torch.cuda.stream(second):
            found.append(solve(problem, backend=backend, **OPTIONS))
        for stream in (first, second):
            torch.cuda.current_stream().wait_stream(stream)
        alone = solve(problem, backend=backend, **OPTIONS)
        for results in found:
            assert_same_bits(results, alone)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the row kernels that Triton was given, in this order."""
    names: list[str] = []
    for file in ("row_logprob_triton", "row_logprob_split_triton", "row_gradient_triton"):
        module = importlib.import_module(f"robust_dpo.kernels.{file}")

        def launch(kernel: Any, *arguments: Any, inner: Callable[..., None] = module.launch) -> None:
            names.append(kernel.fn.__name__)
            inner(kernel, *arguments)

        monkeypatch.setattr(module, "launch", launch)
    return names


def shifted_logits(responses: int = 5, width: int = 150, vocab: int = 1009) -> tuple[Tensor, Tensor]:
    """Logits [B, T + 1, V] of a model, a leaf, and the next tokens [B, T] with prompts of other lengths."""
    logits = (3 * torch.randn(responses, width + 1, vocab, device=DEVICE)).bfloat16().requires_grad_()
    targets = torch.randint(vocab, (responses, width), device=DEVICE)
    for response in range(responses):
        targets[response, : 7 * response] = -100
    return logits, targets


def logits_step(logits: Tensor, targets: Tensor, backend: str) -> tuple[Tensor, ...]:
    """Log-probs, and the gradient of a weighted sum of them."""
    logps = sequence_logps_from_logits(logits[:, :-1], targets, backend=backend)
    assert isinstance(logps, Tensor)
    factors = torch.linspace(-1, 1, len(logps), device=logps.device)
    return logps.detach(), *torch.autograd.grad(logps @ factors, logits)


def test_logits_take_one_launch_each_way(launched: list[str]) -> None:
    require_backend("triton")
    logits, targets = shifted_logits()
    logps, gradient = logits_step(logits, targets, "triton")
    # More than twice as many rows as any GPU has multiprocessors: none is split.
    assert launched == ["row_logprob_kernel", "row_gradient_kernel"]
    right = logits.detach().double().requires_grad_()
    log_probs = right[:, :-1].log_softmax(2).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    exact = (log_probs * (targets >= 0)).sum(1)
    (exact_gradient,) = torch.autograd.grad(exact @ torch.linspace(-1, 1, len(exact), device=DEVICE).double(), right)
    assert relative_error(logps, exact) < 1e-6
    assert relative_error(gradient, exact_gradient) < 5e-3
    assert bool((gradient[:, -1] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("restored_sync_mode")
def test_logits_never_wait(backend: str) -> None:
    require_backend(backend)
    logits, targets = shifted_logits()
    logits_step(logits, targets, backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    logits_step(logits, targets, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_capture_into_a_graph(backend: str) -> None:
    require_backend(backend)
    logits, targets = shifted_logits()
    graph, results = captured(lambda: logits_step(logits, targets, backend))
    for _ in range(3):
        with torch.no_grad():
            logits.copy_(3 * torch.randn_like(logits))
            targets.copy_(targets.roll(1, 0))
        graph.replay()
        replayed = tuple(each.clone() for each in results)
        assert_same_bits(replayed, logits_step(logits, targets, backend))


def peak_of(step: Callable[[], object]) -> int:
    """Bytes above those in use before a step that has run once: kernels are loaded, cuBLAS has its workspace."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_second_chunk_adds_to_the_fp32_sum_where_it_is() -> None:
    rows, width, vocab = 512, 1024, 50_257
    tiles = (torch.randn(2, rows, vocab, device=DEVICE) / 64).bfloat16()
    states = torch.randn(2, rows, width, device=DEVICE).bfloat16()
    # Powers of two: what is rounded in the test is nothing but the sums.
    factors = torch.exp2(torch.randint(-3, 4, (2, rows), device=DEVICE).float())
    total = torch.full((vocab, width), float("nan"), device=DEVICE)
    gemm.add_product(total, tiles[0], states[0], factors[0], first=True)
    gemm.add_product(total, tiles[1], states[1], factors[1], first=False)
    some = torch.randint(vocab, (64,), device=DEVICE)
    exact = torch.zeros(64, width, dtype=torch.float64, device=DEVICE)
    for tile, x, factor in zip(tiles, states, factors, strict=True):
        exact += tile[:, some].double().t() @ (x.double() * factor[:, None].double())
    # Rounded to bf16 in between it would be 1e-3.
    assert relative_error(total[some], exact) < 1e-5
    only_rows = peak_of(lambda: gemm.add_product(total, tiles[1], states[1], factors[1], first=False))
    assert only_rows == states[1].nbytes
    scaled = states[1] * 2
    arguments = {"out_dtype": torch.float32, "out": total}
    assert peak_of(lambda: torch.addmm(total, tiles[1].t(), scaled, **arguments)) == 0


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_peak_memory(frozen: bool, padded: bool) -> None:
    responses, length, width, vocab, chunk = 16, 256, 1024, 128_256, 256 << 20
    positions = (responses, 2 * length) if padded else (responses * length,)
    hidden = torch.randn(*positions, width, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight = (torch.randn(vocab, width, device=DEVICE) / 32).bfloat16().requires_grad_(not frozen)
    targets = torch.randint(vocab, positions, device=DEVICE)
    if padded:
        targets[:, :length] = -100
    seq_lens = None if padded else torch.full((responses,), length)
    ref_logps = torch.full((responses,), -3000.0, device=DEVICE)

    def step() -> None:
        output = linear_preference_loss(
            hidden,
            weight,
            targets,
            seq_lens=seq_lens,
            ref_logps=ref_logps,
            robust=KL,
            tile_dtype=torch.bfloat16,
            chunk_bytes=chunk,
        )
        torch.autograd.grad(output.loss, [hidden] if frozen else [hidden, weight])

    peak = peak_of(step)
    inputs = hidden.nbytes + weight.nbytes
    outputs = hidden.nbytes + (0 if frozen else weight.nbytes)
    accumulated = 0 if frozen else 4 * vocab * width
    allowed = 1.02 * (inputs + outputs + chunk + accumulated) - inputs
    assert peak <= allowed, f"{peak / 2**20:.0f} MiB over the inputs, allowed {allowed / 2**20:.0f} MiB"
