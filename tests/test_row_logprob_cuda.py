"""row_logprob in CUDA: sizes, layouts, plans. test_row_logprob.py has the hostile inputs.

On a GPU where the extension runs on one; otherwise the same kernels are compiled for the CPU and run thread by thread.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from cuda_emulated import ROW_PLANS, launcher_module, row_launchers, row_logprob
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import Case, assert_within_budget, check_errors, dtype_id, error, make_case, poisoned, run, solved
from torch import Tensor

from robust_dpo.kernels.row_logprob import IGNORE_INDEX, RowLogprob, RowLogprobLauncher
from robust_dpo.kernels.row_plan_cuda import (
    BLOCKS_PER_MULTIPROCESSOR,
    MAX_CLUSTER,
    RESERVED_BYTES,
    SEGMENT_BYTES,
    Chip,
    RowPlan,
    chip_of,
    has_clusters,
    plan_gradient,
    plan_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
A100 = Chip(108, 164 << 10, 163 << 10, clusters=False)
H100 = Chip(132, 228 << 10, 227 << 10, clusters=True)
RTX_5090 = Chip(170, 100 << 10, 99 << 10, clusters=True)


@pytest.mark.parametrize(
    ("architectures", "capability", "clusters"),
    [("sm_80 sm_90 compute_90", 90, True), ("sm_80 sm_90 compute_90", 80, False), ("sm_80 compute_80", 80, False),
     ("sm_80 compute_80", 90, False), ("sm_80 sm_89 compute_89", 120, False), ("sm_80 sm_90 compute_90", 120, True),
     ("sm_120 compute_120", 120, True)],
)  # fmt: skip
def test_clusters_need_code_that_has_them(architectures: str, capability: int, clusters: bool) -> None:
    # Code for sm_80 that the driver compiles for sm_90 exchanges nothing: rows cut over a cluster would be wrong.
    assert has_clusters(architectures, capability) is clusters


def test_a_chip_is_planned_for_the_code_that_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = SimpleNamespace(
        multi_processor_count=132,
        shared_memory_per_multiprocessor=228 << 10,
        shared_memory_per_block_optin=227 << 10,
        major=9,
        minor=0,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    device = torch.device("cuda", 63)  # which no machine has: what is asked is kept
    assert chip_of(device, "sm_80 sm_90 compute_90") == H100
    chip = chip_of(device, "sm_80 compute_80")
    assert chip == dataclasses.replace(H100, clusters=False)
    for rows in (1, 63, 1000):
        assert not plan_rows(rows, 128_256, 2, gradient=True, narrowed=False, chip=chip).cluster


@pytest.fixture(params=ROW_PLANS)
def launcher(request: pytest.FixtureRequest) -> RowLogprobLauncher:
    return row_launchers()[request.param]


@pytest.mark.parametrize("transform", ["plain", "softcap", "all"])
@pytest.mark.parametrize(("rows", "vocab"), list(itertools.product([0, 1, 7], [1, 31, 1024])))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_errors_stay_within_twice_those_of_pytorch(
    launcher: RowLogprobLauncher, dtype: torch.dtype, rows: int, vocab: int, transform: str
) -> None:
    check_errors(launcher, dtype, rows, vocab, transform)


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize(("rows", "vocab"), [(3, 50257), (1, 129920)])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_errors_of_long_rows(
    launcher: RowLogprobLauncher, dtype: torch.dtype, rows: int, vocab: int, transform: str
) -> None:
    check_errors(launcher, dtype, rows, vocab, transform)


def placed(values: Tensor, stride: int, shift: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix with the shape of `values`, rows `stride` elements apart, the first `shift` behind an aligned address,
    and the memory it lies in, full of 123.
    """
    rows, vocab = values.shape
    memory = torch.full((shift + rows * stride + 16,), 123.0, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory.as_strided((rows, vocab), (stride, 1), shift), memory


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("gradient", ["apart", "in phase", "in place", "none"])
@pytest.mark.parametrize(("vocab", "padding", "shift"), [(640, 16, 8), (5, 0, 0), (613, 2, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_any_layout(
    launcher: RowLogprobLauncher,
    dtype: torch.dtype,
    vocab: int,
    padding: int,
    shift: int,
    gradient: str,
    transform: str,
) -> None:
    # Odd strides give every row another distance to the next 16-byte boundary.
    case, truth, budget = solved(dtype, 9, vocab, transform)
    stride = vocab + padding
    tile, memory = placed(case.logits, stride, shift, dtype)
    tile.copy_(case.logits.detach())
    moved = Case(tile, case.targets, case.row_scale, case.bias, case.softcap, case.logit_scale)
    grad, grad_memory = {
        "apart": lambda: placed(tile, stride + 3, shift + 1, dtype),
        "in phase": lambda: placed(tile, stride + 16, shift + 16, dtype),
        "in place": lambda: (tile, memory),
        "none": lambda: (None, memory),
    }[gradient]()
    result = run(launcher, moved, grad)
    assert_within_budget(result, truth[3].to(dtype) if grad is None else grad, truth, budget)
    for matrix, whole in ((tile, memory), (grad, grad_memory)):
        if matrix is not None:
            outside = torch.ones_like(whole, dtype=torch.bool)
            outside.as_strided(matrix.shape, matrix.stride(), matrix.storage_offset()).fill_(False)
            assert (whole[outside] == 123).all()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize(("vocab", "padding"), [(9000, 0), (9001, 0), (9000, 24), (5, 0)])
def test_narrow_gradient_over_the_front_of_rows(
    launcher: RowLogprobLauncher, narrow: torch.dtype, vocab: int, padding: int
) -> None:
    # Many steps of the loop: a store that reached elements not read yet would spoil the rest of the row.
    case = make_case(torch.float32, 3, vocab, "scale")
    apart = poisoned(case, narrow)
    expected = run(launcher, case, apart)
    wide = torch.full((3, vocab + padding), 7.0)
    tile, over = wide[:, :vocab], wide.view(narrow)[:, :vocab]
    tile.copy_(case.logits.detach())
    moved = Case(tile, case.targets, case.row_scale, case.bias, case.softcap, case.logit_scale)
    result = run(launcher, moved, over)
    torch.testing.assert_close(result.logp, expected.logp, rtol=1e-6, atol=0)
    torch.testing.assert_close(over, apart, rtol=torch.finfo(narrow).eps, atol=6e-8)


@settings(max_examples=60)
@given(
    rows=st.integers(0, 4),
    vocab=st.integers(1, 700),
    padding=st.integers(0, 9),
    shift=st.integers(0, 9),
    threads=st.integers(1, 5),
    segments=st.integers(1, 8),
    cluster=st.booleans(),
    keep=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_every_plan_and_place(
    rows: int,
    vocab: int,
    padding: int,
    shift: int,
    threads: int,
    segments: int,
    cluster: bool,
    keep: bool,
    dtype: torch.dtype,
) -> None:
    plan = RowPlan(32 * threads, segments, cluster, keep and (cluster or segments == 1))
    case = make_case(dtype, rows, vocab)
    truth = case.plain(torch.float64)
    tile, memory = placed(case.logits, vocab + padding, shift, dtype)
    tile.copy_(case.logits.detach())
    moved = Case(tile, case.targets, case.row_scale, case.bias, case.softcap, case.logit_scale)
    result = run(functools.partial(row_logprob, plan=plan), moved, tile)
    assert_within_budget(result, tile, truth, [2e-6, 2e-6, 2e-5, 4 * torch.finfo(dtype).eps])
    assert (memory[:shift] == 123).all()
    assert (memory.as_strided((rows, padding), (vocab + padding, 1), shift + vocab) == 123).all()


@settings(max_examples=60)
@given(
    rows=st.integers(0, 4),
    vocab=st.integers(1, 700),
    padding=st.integers(0, 9),
    shift=st.integers(0, 9),
    threads=st.integers(1, 5),
    segments=st.integers(1, 8),
    transform=st.sampled_from(["plain", "all"]),
    dtypes=st.sampled_from([*zip(DTYPES, DTYPES, strict=True), *((torch.float32, narrow) for narrow in DTYPES[1:])]),
)
def test_gradient_of_known_results_by_every_plan_and_place(
    rows: int,
    vocab: int,
    padding: int,
    shift: int,
    threads: int,
    segments: int,
    transform: str,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    dtype, grad_dtype = dtypes
    case = make_case(dtype, rows, vocab, transform)
    logp, lse, _, truth = case.plain(torch.float64)
    ignored = torch.rand(rows) < 0.3
    case.targets[ignored] = IGNORE_INDEX
    truth[ignored] = 0.0
    tile, memory = placed(case.logits, vocab + padding, shift, dtype)
    tile.copy_(case.logits.detach())
    tile[ignored] = float("nan")
    phase = shift * (dtype.itemsize // grad_dtype.itemsize)
    stride = (vocab + padding) * (dtype.itemsize // grad_dtype.itemsize)
    over = memory.view(grad_dtype).as_strided((rows, vocab), (stride, 1), phase)
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(tile.shape, tile.stride(), shift).fill_(False)
    known = RowLogprob(logp.float(), lse.float(), None)
    row_logprob(
        tile,
        case.targets,
        plan=RowPlan(32 * threads, segments),
        grad_out=over,
        known=known,
        **case.options(),  # type: ignore[arg-type]  # a table of mixed options
    )
    # e^{v − lse} has the rounding of v and lse, absolutely.
    magnitude = max(1.0, float(lse.abs().max()) if rows else 1.0) * max(
        1.0, float(case.row_scale.abs().max()) if rows else 1.0
    )
    largest = float(truth.abs().max()) if rows else 0.0
    assert error(over, truth) <= torch.finfo(grad_dtype).eps * largest + 8 * torch.finfo(torch.float32).eps * magnitude
    assert (over[ignored] == 0).all()
    assert (memory[outside] == 123).all()


def test_plans_of_gradients() -> None:
    for chip in (A100, H100, RTX_5090):
        assert plan_gradient(2048, 128256, 2, narrowed=False, chip=chip) == RowPlan(512)
        assert plan_gradient(4, 10**6, 4, narrowed=True, chip=chip) == RowPlan(512)
        few = plan_gradient(4, 128256, 2, narrowed=False, chip=chip)
        assert 4 * few.segments >= 60 and not few.keep and not few.cluster
        assert plan_gradient(1, 5, 2, narrowed=False, chip=chip) == RowPlan(128)


def test_repeated_calls_give_the_same_bits(launcher: RowLogprobLauncher) -> None:
    # Emulated, the threads run in another order every time, as far as barriers let them.
    case = make_case(torch.bfloat16, 3, 5003)
    results = []
    for _ in range(4):
        grad = poisoned(case)
        results.append((*run(launcher, case, grad), grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("chip", [A100, H100, RTX_5090], ids=["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("narrowed", [False, True], ids=["same width", "narrowed"])
def test_plans_can_run(chip: Chip, itemsize: int, narrowed: bool) -> None:
    for rows, vocab, gradient in itertools.product(
        (1, 7, 100, 2048, 10**6), (1, 31, 1000, 32000, 50257, 128256, 151936, 256000, 10**6, 10**7), (False, True)
    ):
        plan = plan_rows(rows, vocab, itemsize, gradient=gradient, narrowed=narrowed and gradient, chip=chip)
        assert plan.threads % 32 == 0 and 128 <= plan.threads <= 512
        assert plan.segments >= 1 and not (plan.cluster and (plan.segments > MAX_CLUSTER or not chip.clusters))
        kept = -(-vocab * itemsize // plan.segments) if plan.keep else 0
        assert kept + RESERVED_BYTES <= chip.shared_bytes_of_block
        if plan.segments > 1:
            assert plan.keep or vocab * itemsize // plan.segments >= SEGMENT_BYTES
        if narrowed and gradient:
            assert plan.segments == 1 or plan.keep
        if plan.keep:
            assert gradient and (plan.cluster or plan.segments == 1)


def test_a_row_is_read_from_memory_once_where_the_chip_can_hold_it() -> None:
    for vocab, blocks in ((32000, 1), (50257, 1), (128256, 4), (151936, 4), (256000, 8)):
        plan = plan_rows(2048, vocab, 2, gradient=True, narrowed=False, chip=H100)
        assert plan == RowPlan(512, blocks, blocks > 1, keep=True)
        # So that two blocks share a multiprocessor.
        assert BLOCKS_PER_MULTIPROCESSOR * (vocab * 2 / blocks + RESERVED_BYTES) <= H100.shared_bytes
    assert plan_rows(2048, 32000, 2, gradient=True, narrowed=False, chip=A100).keep
    assert not plan_rows(2048, 128256, 2, gradient=True, narrowed=False, chip=A100).keep
    assert not plan_rows(2048, 128256, 2, gradient=False, narrowed=False, chip=H100).keep


def test_few_rows_are_shared() -> None:
    assert plan_rows(4, 128256, 2, gradient=True, narrowed=False, chip=H100).segments == 8
    assert plan_rows(4, 128256, 2, gradient=False, narrowed=False, chip=H100).segments == 8
    assert plan_rows(4, 128256, 2, gradient=True, narrowed=False, chip=A100) == RowPlan(512, 15)
    assert plan_rows(4, 128256, 4, gradient=True, narrowed=True, chip=A100).segments == 1


def test_plan_of_the_launcher_gives_the_same_numbers() -> None:
    check_errors(functools.partial(row_logprob, plan=None), torch.bfloat16, 3, 10007, "all")


def test_bad_calls() -> None:
    module = launcher_module("row_logprob")
    logits, targets = torch.randn(2, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16 for CUDA, got torch\.float64"):
        module.row_logprob(logits.double(), targets)
    with pytest.raises(ValueError, match="logits: expected a tensor on a GPU, got meta"):
        module.row_logprob(logits.to("meta"), targets.to("meta"))
    # What CUDA would refuse comes back with the kernel and the shape.
    with pytest.raises(RuntimeError, match=r"row_logprob \[2, 5\]: cudaErrorInvalidConfiguration"):
        module.row_logprob(logits, targets, plan=RowPlan(100))
