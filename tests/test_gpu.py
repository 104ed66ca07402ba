"""What only a GPU can show: right numbers at full speed, no waiting, graphs, streams, huge tiles, peak memory.

ROBUST_DPO_TEST_DEVICE=cpu runs on the CPU what is not about CUDA itself: a check of this file. Kernels have tests of
their own, through Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from problems import Problem, make_problem, relative_error, require_backend
from row_cases import assert_within_budget, dtype_id, solved
from torch import Tensor

from robust_dpo import (
    KLRobust,
    linear_preference_loss,
    preference_loss,
    reference,
    sequence_logps,
    sequence_logps_from_logits,
)
from robust_dpo.dispatch import get_row_logprob
from robust_dpo.kernels.row_logprob import RowLogprob

DEVICE = torch.device(os.environ.get("ROBUST_DPO_TEST_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"),
]
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="about CUDA itself")
BACKENDS = ["torch", "triton", "auto"] if DEVICE.type == "cuda" else ["torch", "auto"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of a sum of a few hundred products, its rounding to the dtype, and of a tile in that dtype before the softmax.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
KL = KLRobust(lam=0.5)


def tokens(group_sizes: list[int], dtype: torch.dtype, **options: Any) -> Problem:
    """A problem on the CPU with a vocabulary that is a multiple of nothing."""
    return make_problem(group_sizes, vocab=1009, width=64, longest=40, **options).to(dtype)


def there(problem: Problem) -> Problem:
    """A copy on the device; numbers of rows and responses stay on the host, where they need not be waited for."""
    kwargs = {
        name: value if name in ("seq_lens", "group_sizes") else value.detach().to(DEVICE, copy=True)
        for name, value in problem.kwargs.items()
    }
    hidden, weight, targets = (each.detach().to(DEVICE, copy=True) for each in problem.args)
    copy = Problem(hidden, weight, targets, kwargs)
    for leaf in copy.leaves.values():
        leaf.requires_grad_()
    return copy


def solve(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """Loss and gradients."""
    output = linear_preference_loss(*problem.args, **problem.kwargs, robust=KL, **options)
    return output.loss.detach(), *torch.autograd.grad(output.loss, list(problem.leaves.values()))


def exact(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """The same in float64 on the CPU."""
    wide = problem.to(torch.float64)
    loss = reference.linear_preference_loss(*wide.args, **wide.kwargs, robust=KL, **options)
    return loss.detach(), *torch.autograd.grad(loss, list(wide.leaves.values()))


def assert_close(found: tuple[Tensor, ...], right: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for place, (ours, truth) in enumerate(zip(found, right, strict=True)):
        assert relative_error(ours.cpu(), truth) < TOLERANCE[dtype], f"result {place}"


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("padding", [0, 7], ids=["dense-rows", "odd-stride"])
@pytest.mark.parametrize("vocab", [1, 31, 1024, 50257, 129920])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_logprob(backend: str, dtype: torch.dtype, vocab: int, padding: int, transform: str) -> None:
    require_backend(backend)
    case, truth, budget = solved(dtype, 7, vocab, transform)
    tile = torch.full((7, vocab + padding), float("nan"), dtype=dtype, device=DEVICE)[:, :vocab]
    tile.copy_(case.logits)
    options: dict[str, Any] = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in case.options().items()
    }
    launcher = get_row_logprob(backend, DEVICE, dtype)
    result = launcher(tile, case.targets.to(DEVICE), grad_out=tile, entropy=True, **options)
    assert result.entropy is not None
    found = RowLogprob(result.logp.cpu(), result.lse.cpu(), result.entropy.cpu())
    assert_within_budget(found, tile.cpu(), truth, budget)


@pytest.mark.parametrize("source", ["cached", "live"])
@pytest.mark.parametrize("sizes", [[2] * 6, [4] * 3, [2, 1, 5, 3]], ids=["pairs", "lists", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_preference_loss(backend: str, dtype: torch.dtype, sizes: list[int], source: str) -> None:
    require_backend(backend)
    problem = tokens(sizes, dtype, reference=source, calibration=True)
    found = solve(there(problem), backend=backend, chunk_bytes=64 * 1009)
    assert_close(found, exact(problem), dtype)


@pytest.mark.parametrize("tile_dtype", [torch.bfloat16, torch.float32], ids=["bf16-tile", "fp32-tile"])
@pytest.mark.parametrize(
    "options",
    [{"softcap": 6.0}, {"logit_scale": 0.5}, {"loss": "plackett_luce"}, {"loss": "ipo", "beta": 0.3}],
    ids=["softcap", "scale", "plackett_luce", "ipo"],
)
def test_variants_of_the_head(options: dict[str, Any], tile_dtype: torch.dtype) -> None:
    problem = tokens([2, 3, 2, 4], torch.bfloat16, reference="cached", scores=True, bias=True, packed=True)
    found = solve(there(problem), tile_dtype=tile_dtype, chunk_bytes=64 * 1009, **options)
    assert_close(found, exact(problem, **options), torch.bfloat16)


def test_frozen_head_gets_no_gradient() -> None:
    problem = tokens([2] * 4, torch.bfloat16)
    ours = there(problem)
    ours.weight.requires_grad_(False)
    output = linear_preference_loss(*ours.args, **ours.kwargs, robust=KL)
    output.loss.backward()
    assert ours.weight.grad is None
    assert ours.hidden.grad is not None
    assert_close((output.loss, ours.hidden.grad), exact(problem)[:2], torch.bfloat16)


def test_tied_head_gets_both_gradients() -> None:
    problem = tokens([2] * 4, torch.float32)
    ids = torch.randint(1009, problem.targets.shape)

    def gradient(device: torch.device, dtype: torch.dtype) -> Tensor:
        weight = problem.weight.detach().to(device, dtype).requires_grad_()
        kwargs = {
            name: value.detach().to(device, dtype) if value.is_floating_point() else value
            for name, value in problem.kwargs.items()
        }
        hidden, targets = weight[ids.to(device)], problem.targets.to(device)
        if dtype == torch.float64:
            loss = reference.linear_preference_loss(hidden, weight, targets, robust=KL, **kwargs)
        else:
            loss = linear_preference_loss(hidden, weight, targets, robust=KL, **kwargs).loss
        return torch.autograd.grad(loss, weight)[0]

    right = gradient(torch.device("cpu"), torch.float64)
    assert relative_error(gradient(DEVICE, torch.float32).cpu(), right) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_logps(backend: str, dtype: torch.dtype) -> None:
    require_backend(backend)
    problem = tokens([2, 3], dtype, reference="none")
    ours, wide = there(problem), problem.to(torch.float64)
    logps = sequence_logps(*ours.args, backend=backend, chunk_bytes=64 * 1009)
    assert isinstance(logps, Tensor)
    right = reference.sequence_logps(reference.transformed_logits(wide.hidden, wide.weight), wide.targets)[0]
    found = (logps, *torch.autograd.grad(logps.square().sum(), [ours.hidden, ours.weight]))
    assert_close(found, (right, *torch.autograd.grad(right.square().sum(), [wide.hidden, wide.weight])), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_logits_route(dtype: torch.dtype) -> None:
    problem = tokens([2, 2, 2], dtype, reference="none")
    logits = reference.transformed_logits(problem.hidden, problem.weight).detach()
    ours, wide = logits.to(DEVICE, copy=True).requires_grad_(), logits.double().requires_grad_()
    ref_logps = -30 * torch.rand(6)
    logps = sequence_logps_from_logits(ours, problem.targets.to(DEVICE))
    assert isinstance(logps, Tensor)
    loss = preference_loss(logps, ref_logps.to(DEVICE), robust=KL).loss
    right_logps = reference.sequence_logps(wide, problem.targets)[0]
    right = preference_loss(right_logps, ref_logps.double(), robust=KL).loss
    found = (loss, *torch.autograd.grad(loss, ours))
    assert_close(found, (right, *torch.autograd.grad(right, wide)), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend: str) -> None:
    require_backend(backend)
    problem = there(tokens([2] * 8, torch.bfloat16, calibration=True))
    first = solve(problem, backend=backend, chunk_bytes=64 * 1009)
    for _ in range(3):
        assert all(map(torch.equal, first, solve(problem, backend=backend, chunk_bytes=64 * 1009)))


@pytest.fixture
def restored_sync_mode() -> Iterator[None]:
    """Lets the next test wait for the GPU again."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def own_loss(groups: Any) -> Tensor:
    """DPO as a user would write it: no kernel knows it."""
    return -torch.nn.functional.logsigmoid(0.1 * (groups.log_ratios[:, 0] - groups.log_ratios[:, 1]))


@needs_cuda
@pytest.mark.parametrize("source", ["cached", "live"])
@pytest.mark.parametrize("loss", ["sigmoid", own_loss], ids=["sigmoid", "own"])
@pytest.mark.usefixtures("restored_sync_mode")
def test_nothing_waits_for_the_gpu(source: str, loss: Any) -> None:
    problem = there(tokens([2] * 8, torch.bfloat16, reference=source, calibration=True, packed=True))
    solve(problem, loss=loss, chunk_bytes=64 * 1009)  # compiles kernels and sends the layout
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    solve(problem, loss=loss, chunk_bytes=64 * 1009)


@needs_cuda
@pytest.mark.parametrize("backend", BACKENDS)
def test_capture_into_a_graph(backend: str) -> None:
    require_backend(backend)
    problem = there(tokens([2] * 8, torch.bfloat16, reference="cached", calibration=True, packed=True))
    options = {"backend": backend, "chunk_bytes": 64 * 1009}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            solve(problem, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve(problem, **options)
    for _ in range(3):
        with torch.no_grad():
            for leaf in problem.leaves.values():
                leaf.copy_(torch.randn_like(leaf) / 8)
            problem.kwargs["ref_logps"].copy_(-30 * torch.rand_like(problem.kwargs["ref_logps"]))
        graph.replay()
        replayed = tuple(each.clone() for each in captured)
        assert all(map(torch.equal, replayed, solve(problem, **options)))


@needs_cuda
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_at_the_same_time(backend: str) -> None:
    require_backend(backend)
    problems = [there(tokens([2] * 16, torch.bfloat16, calibration=True)) for _ in range(2)]
    options = {"backend": backend, "chunk_bytes": 64 * 1009}
    alone = [solve(problem, **options) for problem in problems]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(10):
        together = []
        for problem, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                together.append(solve(problem, **options))
        torch.cuda.synchronize()
        for found, right in zip(together, alone, strict=True):
            assert all(map(torch.equal, found, right))


@needs_cuda
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_more_than_two_to_the_31_logits(backend: str) -> None:
    require_backend(backend)
    rows, vocab = 17_000, 128_256
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocab * 2:
        pytest.skip("needs 13 GB of GPU memory")
    assert rows * vocab > 2**31
    tile = torch.randn(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    some = torch.tensor([0, 1, 2**31 // vocab, 2**31 // vocab + 1, rows - 1])
    logits = tile[some.to(DEVICE)].cpu().double()
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    result = get_row_logprob(backend, DEVICE, torch.bfloat16)(tile, targets, grad_out=tile)
    chosen = targets[some.to(DEVICE)].cpu()
    logp, lse, _ = reference.row_logprob(logits, chosen)
    torch.testing.assert_close(result.logp[some.to(DEVICE)].cpu().double(), logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.lse[some.to(DEVICE)].cpu().double(), lse, rtol=1e-5, atol=1e-5)
    gradient = reference.row_gradient(logits, chosen)
    torch.testing.assert_close(tile[some.to(DEVICE)].cpu().double(), gradient, rtol=1e-2, atol=1e-6)


@needs_cuda
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_peak_memory(frozen: bool) -> None:
    rows, width, vocab, chunk = 4096, 1024, 128_256, 256 << 20
    hidden = torch.randn(rows, width, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight = (torch.randn(vocab, width, device=DEVICE) / 32).bfloat16().requires_grad_(not frozen)
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    seq_lens, ref_logps = torch.full((16,), rows // 16), torch.full((16,), -3000.0, device=DEVICE)

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

    step()  # kernels, and the workspace of cuBLAS, which stays
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    inputs = 2 * (rows + vocab) * width
    outputs = 2 * rows * width + (0 if frozen else 2 * vocab * width)
    accumulated = 0 if frozen else 4 * vocab * width
    allowed = 1.02 * (inputs + outputs + chunk + accumulated) - inputs
    assert peak <= allowed, f"{peak / 2**20:.0f} MiB over the inputs, allowed {allowed / 2**20:.0f} MiB"
