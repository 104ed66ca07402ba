"""row_logprob, every launcher and instruction set against plain float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_emulated import row_launchers
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import (
    TRANSFORMS,
    Case,
    check_errors,
    dtype_id,
    error,
    make_case,
    poisoned,
    run,
    solved,
    triton_launchers,
)

from robust_dpo.kernels import row_logprob_torch
from robust_dpo.kernels.row_logprob import IGNORE_INDEX, RowLogprob, RowLogprobLauncher

HAS_CPU = importlib.util.find_spec("robust_dpo._cpu") is not None
if HAS_CPU:
    from robust_dpo.kernels import row_logprob_cpu

LAUNCHERS: dict[str, tuple[RowLogprobLauncher, str | None]] = {"torch": (row_logprob_torch.row_logprob, None)}
if HAS_CPU:
    LAUNCHERS |= {f"cpu-{isa}": (row_logprob_cpu.row_logprob, isa) for isa in row_logprob_cpu.usable_isas()}
CPU_LAUNCHERS = [name for name in LAUNCHERS if name != "torch"]

# Numpy speaks up in Triton's interpreter where a GPU computes on, in rows of infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NATIVE_LAUNCHERS = list(LAUNCHERS)
LAUNCHERS |= {name: (function, None) for name, function in (triton_launchers() | row_launchers()).items()}
KERNEL_LAUNCHERS = [name for name in LAUNCHERS if name != "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

needs_cpu = pytest.mark.skipif(not HAS_CPU, reason="the native CPU extension is not built")


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> RowLogprobLauncher:
    function, isa = LAUNCHERS[name]
    if isa is not None:
        monkeypatch.setenv("ROBUST_DPO_CPU_ISA", isa)
    return function


def skip_wide_tiles(request: pytest.FixtureRequest) -> None:
    dtypes = {request.node.callspec.params.get(name) for name in ("dtype", "tile_dtype")}
    if request.param.startswith(("triton", "cuda")) and torch.float64 in dtypes:
        pytest.skip("kernels for GPUs take no float64 tiles")


@pytest.fixture(params=list(LAUNCHERS))
def launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RowLogprobLauncher:
    skip_wide_tiles(request)
    return use(request.param, monkeypatch)


@pytest.fixture(params=NATIVE_LAUNCHERS)
def native_launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RowLogprobLauncher:
    """Those that are fast without a GPU; test_row_logprob_triton.py and …_cuda.py have the sizes for the others."""
    return use(request.param, monkeypatch)


@pytest.fixture(params=KERNEL_LAUNCHERS)
def kernel_launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RowLogprobLauncher:
    return use(request.param, monkeypatch)


@pytest.fixture(params=CPU_LAUNCHERS)
def cpu_launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RowLogprobLauncher:
    return use(request.param, monkeypatch)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("vocab", [1, 31, 1024, 50257, 129920])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_errors_stay_within_twice_those_of_pytorch(
    native_launcher: RowLogprobLauncher, dtype: torch.dtype, vocab: int, rows: int, transform: str
) -> None:
    check_errors(native_launcher, dtype, rows, vocab, transform)


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize(
    ("tile_dtype", "grad_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
     (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, torch.float16),
     (torch.float64, torch.float64)],
    ids=dtype_id,
)  # fmt: skip
@pytest.mark.parametrize("vocab", [1, 37, 20011])
def test_in_place_equals_out_of_place(
    launcher: RowLogprobLauncher, tile_dtype: torch.dtype, grad_dtype: torch.dtype, vocab: int, transform: str
) -> None:
    case = make_case(tile_dtype, 5, vocab, transform)
    apart = poisoned(case, grad_dtype)
    expected = run(launcher, case, apart)
    # The gradient over the front of each row: same first byte, same stride in bytes.
    tile = case.logits.clone()
    over = tile.view(grad_dtype)[:, :vocab]
    moved = Case(tile, case.targets, case.row_scale, case.bias, case.softcap, case.logit_scale)
    result = run(launcher, moved, over)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))  # type: ignore[arg-type]
    assert torch.equal(over, apart)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_narrow_gradient_is_rounded_to_nearest_even(cpu_launcher: RowLogprobLauncher, grad_dtype: torch.dtype) -> None:
    case = make_case(torch.float32, 64, 517)
    # Rows from far below the smallest half to beyond the largest.
    case.row_scale.copy_(torch.logspace(-8, 5, 64))
    exact, narrow = poisoned(case), poisoned(case, grad_dtype)
    run(cpu_launcher, case, exact)
    run(cpu_launcher, case, narrow)
    assert torch.equal(narrow, exact.to(grad_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_padded_rows_are_read_and_written_only_inside(launcher: RowLogprobLauncher, dtype: torch.dtype) -> None:
    case = make_case(dtype, 6, 1003, "bias")
    expected_grad = poisoned(case)
    expected = run(launcher, case, expected_grad)
    wide = torch.full((6, 1003 + 29), float("nan"), dtype=dtype)
    tile = wide[:, 5 : 5 + 1003]
    tile.copy_(case.logits)
    out = torch.full((6, 1003 + 17), 123.0, dtype=dtype)
    grad = out[:, 3 : 3 + 1003]
    padded = Case(tile, case.targets, case.row_scale, case.bias, case.softcap, case.logit_scale)
    result = run(launcher, padded, grad)
    # Where sums are cut follows the alignment on a GPU.
    torch.testing.assert_close(result.logp, expected.logp, rtol=1e-6, atol=0)
    rounding = {
        "rtol": max(3e-6, torch.finfo(dtype).eps),
        "atol": torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps,
    }
    torch.testing.assert_close(grad, expected_grad, **rounding)
    assert (out[:, :3] == 123).all()
    assert (out[:, 3 + 1003 :] == 123).all()


def test_nan_stays_in_its_row(launcher: RowLogprobLauncher) -> None:
    for vocab, place in ((31, 0), (31, 30), (1024, 500), (5000, 4999), (5000, 7)):
        case = make_case(torch.float32, 3, vocab)
        case.logits[1, place] = float("nan")
        grad = poisoned(case)
        result = run(launcher, case, grad)
        for values in result:
            assert values is not None
            assert values.isnan().tolist() == [False, True, False]
        assert grad[1].isnan().all()
        assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("place", [0, 17, 999])
def test_rows_of_minus_infinity_except_one(launcher: RowLogprobLauncher, dtype: torch.dtype, place: int) -> None:
    logits = torch.full((2, 1000), float("-inf"), dtype=dtype)
    logits[:, place] = 2.5
    targets = torch.tensor([place, (place + 1) % 1000])
    grad = torch.full_like(logits, float("nan"))
    logp, lse, entropy = launcher(logits, targets, grad_out=grad, entropy=True)
    assert logp.tolist() == [0.0, float("-inf")]
    assert lse.tolist() == [2.5, 2.5]
    assert entropy is not None
    assert entropy.tolist() == [0.0, 0.0]
    assert (grad[0] == 0).all()
    assert grad[1, place] == 1
    assert grad[1, targets[1]] == -1
    assert grad[1].abs().sum() == 2


def test_rows_of_minus_infinity_have_no_log_prob(launcher: RowLogprobLauncher) -> None:
    logits = torch.full((1, 100), float("-inf"))
    logp, lse, _ = launcher(logits, torch.tensor([3]))
    assert lse.item() == float("-inf")
    assert logp.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_huge_logits(launcher: RowLogprobLauncher, dtype: torch.dtype) -> None:
    big = torch.finfo(dtype).max / 2
    logits = torch.tensor(
        [[big, -big, 0.0], [-big, -big, -big], [big, big, -big], [1e4, 1e4 - 8, 1e4 + 8]], dtype=dtype
    )
    targets = torch.tensor([0, 1, 0, 1])
    case = Case(logits, targets, torch.ones(4), None, None, 1.0)
    truth = case.plain(torch.float64)
    grad = poisoned(case)
    result = run(launcher, case, grad)
    torch.testing.assert_close(result.logp.double(), truth[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(result.lse.double(), truth[1], rtol=1e-6, atol=0)
    assert result.entropy is not None
    assert error(result.entropy, truth[2].nan_to_num(0.0)) < 1e-5
    torch.testing.assert_close(grad.double(), truth[3].double(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("order", ["rising", "falling", "late peak"])
@pytest.mark.parametrize("step", [0.01, 1.0, 15.0, 90.0])
def test_maximum_that_moves_along_the_row(launcher: RowLogprobLauncher, order: str, step: float) -> None:
    row = torch.arange(3001, dtype=torch.float32) * step - 700
    row = {"rising": row, "falling": row.flip(0), "late peak": torch.cat([row[:1].expand(3000), row[-1:]])}[order]
    case = Case(row.expand(2, -1).contiguous(), torch.tensor([0, 3000]), torch.ones(2), None, None, 1.0)
    truth = case.plain(torch.float64)
    grad = poisoned(case)
    result = run(launcher, case, grad)
    for ours, exact in zip((*result, grad), truth, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_ties(launcher: RowLogprobLauncher, dtype: torch.dtype) -> None:
    logits = torch.full((2, 4096), -3.0, dtype=dtype)
    grad = torch.full_like(logits, float("nan"))
    logp, lse, entropy = launcher(logits, torch.tensor([0, 4095]), grad_out=grad, entropy=True)
    uniform = torch.tensor(4096.0, dtype=torch.float64).log()
    torch.testing.assert_close(logp.double(), -uniform.expand(2), rtol=2e-7, atol=0)
    torch.testing.assert_close(lse.double(), (uniform - 3).expand(2), rtol=2e-7, atol=0)
    assert entropy is not None
    torch.testing.assert_close(entropy.double(), uniform.expand(2), rtol=2e-7, atol=0)
    torch.testing.assert_close(grad[:, 1:4095].double(), grad.new_full((2, 4094), 1 / 4096).double(), rtol=1e-6, atol=0)


def test_nearly_certain_target_keeps_its_gradient(kernel_launcher: RowLogprobLauncher) -> None:
    # softmax - 1 computed as a difference in fp32 would be 0 here; its value is -4.1e-8.
    logits = torch.tensor([[17.0, 0.0]])
    grad = torch.empty_like(logits)
    kernel_launcher(logits, torch.tensor([0]), grad_out=grad)
    exact = torch.tensor([-17.0], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(grad[0].double(), torch.cat([-exact, exact]), rtol=1e-6, atol=0)


def test_no_gradient_and_no_entropy_unless_asked(launcher: RowLogprobLauncher) -> None:
    case = make_case(torch.float32, 3, 100)
    before = case.logits.clone()
    result = run(launcher, case, None, entropy=False)
    assert result.entropy is None
    assert torch.equal(case.logits, before)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, transform: str) -> None:
    case = make_case(dtype, 4, 10007, transform)
    results = []
    for name in CPU_LAUNCHERS:
        grad = poisoned(case)
        results.append((*run(use(name, monkeypatch), case, grad), grad))
    for other in results[1:]:
        for name, ours, theirs in zip(("logp", "lse", "entropy"), other, results[0], strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=name)
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(other[3], results[0][3], rtol=2 * rounding + 3e-6, atol=1e-6)


@pytest.mark.parametrize("target", [-1, -(2**62), 100, 2**62])
def test_target_outside_the_vocabulary_touches_no_memory(kernel_launcher: RowLogprobLauncher, target: int) -> None:
    # Python refuses such targets before this point; the kernel must still be safe.
    case = make_case(torch.float32, 2, 100)
    case.targets[1] = target
    grad = poisoned(case)
    result = kernel_launcher(case.logits, case.targets, grad_out=grad)
    assert result.logp.isnan().tolist() == [False, True]
    torch.testing.assert_close(grad[1], case.logits[1].softmax(0), rtol=1e-5, atol=1e-7)


def test_offsets_have_64_bits(kernel_launcher: RowLogprobLauncher) -> None:
    # Row 1 begins past element 2^31; memory that is never touched is never committed.
    stride = 2**31 + 11
    tile = torch.empty(stride + 50, dtype=torch.bfloat16).as_strided((2, 50), (stride, 1))
    small = torch.randn(2, 50).bfloat16()
    tile.copy_(small)
    targets = torch.tensor([1, 49])
    result = kernel_launcher(tile, targets, grad_out=tile)
    expected = kernel_launcher(small, targets, grad_out=small)
    torch.testing.assert_close(result.logp, expected.logp, rtol=1e-6, atol=0)
    torch.testing.assert_close(tile, small, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@needs_cpu
@pytest.mark.usefixtures("restore_threads")
def test_results_do_not_depend_on_the_number_of_threads(cpu_launcher: RowLogprobLauncher) -> None:
    case = make_case(torch.bfloat16, 37, 5003)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        grad = poisoned(case)
        results.append((*run(cpu_launcher, case, grad), grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter; fails the test on a non-zero exit or after a minute."""
    prelude = """
    import os, sys, torch
    from robust_dpo.kernels.row_logprob_cpu import row_logprob, thread_runtime
    logits, targets = torch.randn(64, 20000), torch.randint(0, 20000, (64,))
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_cpu
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_threads_are_those_that_torch_was_given() -> None:
    out = run_python("""
        count = lambda: len(os.listdir("/proc/self/task"))
        torch.set_num_threads(1)
        before = count()
        row_logprob(logits, targets)
        print(count() - before)
        torch.set_num_threads(3)
        row_logprob(logits, targets)
        print(count() - before)
        torch.mm(logits, logits.T)
        print(count() - before, thread_runtime())
    """)
    # The third line: torch adds no threads of its own to the two helpers, it is the same pool.
    assert out.split() == ["0", "2", "2", "openmp"]


@needs_cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_after_fork() -> None:
    out = run_python("""
        torch.set_num_threads(3)
        expected = row_logprob(logits, targets).logp  # the pool is up before the fork
        child = os.fork()
        if child == 0:
            same = torch.equal(row_logprob(logits, targets).logp, expected)
            os._exit(0 if same and thread_runtime() == "std::thread" else 1)
        print(os.waitpid(child, 0)[1])
        assert torch.equal(row_logprob(logits, targets).logp, expected)
    """)
    assert out.split() == ["0"]


@needs_cpu
def test_other_python_threads_run_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = use("cpu-generic", monkeypatch)
    case = make_case(torch.float32, 64, 65536, "softcap")
    span: list[float] = []

    def work() -> None:
        span.append(time.perf_counter())
        run(launcher, case, None)
        span.append(time.perf_counter())

    thread = threading.Thread(target=work)
    ticks = []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0)
    thread.join()
    start, end = span
    inner = [tick for tick in ticks if start + 0.25 * (end - start) < tick < end - 0.25 * (end - start)]
    assert inner, f"no other thread ran during a call of {end - start:.3f} s"


@needs_cpu
@pytest.mark.parametrize("isa", ["sse9", ""])
def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("ROBUST_DPO_CPU_ISA", isa)
    with pytest.raises(ValueError, match="ROBUST_DPO_CPU_ISA: expected one that this CPU and build have"):
        row_logprob_cpu.row_logprob(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))


X = torch.zeros(4, 6)
T = torch.zeros(4, dtype=torch.int64)
BAD_CALLS = {
    "integer logits": ({"logits": X.long()}, "logits: expected dtype float32"),
    "three dimensions": ({"logits": X[None]}, r"logits: expected shape \[n, V\]"),
    "no columns": ({"logits": X[:, :0]}, r"logits: expected shape \[n, V\]"),
    "transposed": ({"logits": torch.zeros(6, 4).T}, "logits: expected unit stride"),
    "expanded": ({"logits": X[:1].expand(4, 6)}, "logits: expected a row stride of at least 6, got 0"),
    "targets too short": ({"targets": T[:3]}, r"targets: expected shape \[4\], got \(3,\)"),
    "targets int32": ({"targets": T.int()}, "targets: expected dtype torch.int64, got torch.int32"),
    "softcap zero": ({"softcap": 0.0}, "softcap: expected a positive number or None, got 0.0"),
    "softcap nan": ({"softcap": float("nan")}, "softcap: expected a positive number or None, got nan"),
    "bias shape": ({"bias": torch.zeros(4)}, r"bias: expected shape \[6\], got \(4,\)"),
    "bias device": ({"bias": torch.zeros(6, device="meta")}, "bias: expected a tensor on cpu"),
    "row_scale shape": ({"row_scale": torch.zeros(6)}, r"row_scale: expected shape \[4\], got \(6,\)"),
    "gradient shape": ({"grad_out": torch.zeros(4, 5)}, r"grad_out: expected shape \[4, 6\]"),
    "gradient integer": ({"grad_out": X.int()}, "grad_out: expected a floating dtype"),
    "gradient double": ({"grad_out": X.double()}, "grad_out: expected a floating dtype"),
    "gradient a row further": (
        {"logits": X[:3], "targets": T[:3], "grad_out": X[1:]}, "grad_out: expected memory apart from logits",
    ),
    "gradient in other rows": (
        {"grad_out": X.view(torch.bfloat16).view(8, 6)[:4]}, "grad_out: expected memory apart from logits",
    ),
    "gradient wider than the tile": (
        {"logits": X.view(torch.bfloat16)[:, :6], "grad_out": X}, "grad_out: expected memory apart from logits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(launcher: RowLogprobLauncher, name: str) -> None:
    changes, message = BAD_CALLS[name]
    arguments = {"logits": X, "targets": T} | changes
    with pytest.raises(ValueError, match=message):
        launcher(arguments.pop("logits"), arguments.pop("targets"), **arguments)


@needs_cpu
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 4), vocab=st.integers(1, 300), shift=st.integers(-60, 60), seed=st.integers(0, 2**31 - 1))
def test_shift_and_permutation(rows: int, vocab: int, shift: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/8 below 2^13: the shifted logits are exact in fp32.
    logits = torch.randint(-80, 80, (rows, vocab), generator=generator) / 8
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    order = torch.randperm(vocab, generator=generator)
    grad, shifted_grad, permuted_grad = (torch.full_like(logits, float("nan")) for _ in range(3))
    base = row_logprob_cpu.row_logprob(logits, targets, grad_out=grad)
    shifted = row_logprob_cpu.row_logprob(logits + shift, targets, grad_out=shifted_grad)
    permuted = row_logprob_cpu.row_logprob(logits[:, order], order.argsort()[targets], grad_out=permuted_grad)
    torch.testing.assert_close(shifted.logp, base.logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shifted.lse, base.lse + shift, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shifted_grad, grad, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(permuted.logp, base.logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(permuted_grad, grad[:, order], rtol=2e-6, atol=1e-7)
    # Each row of softmax - onehot sums to 0.
    torch.testing.assert_close(grad.double().sum(1), torch.zeros(rows, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("vocab", [1, 37, 1024])
def test_ignored_rows_are_not_read_and_count_nothing(
    launcher: RowLogprobLauncher, dtype: torch.dtype, vocab: int, transform: str
) -> None:
    case = make_case(dtype, 6, vocab, transform)
    expected_grad = poisoned(case)
    expected = run(launcher, case, expected_grad)
    ignored = torch.tensor([True, False, False, True, False, True])
    # What nobody reads may be anything.
    case.logits[ignored] = float("nan")
    case.row_scale[ignored] = float("nan")
    case.targets[ignored] = IGNORE_INDEX
    in_place = case.logits.clone()
    for grad in (poisoned(case), in_place, None):
        moved = replace(case, logits=in_place) if grad is in_place else case
        result = run(launcher, moved, grad)
        pairs = zip((*result, grad), (*expected, expected_grad), strict=True)
        for ours, others in [(ours, others) for ours, others in pairs if ours is not None]:
            assert others is not None
            assert torch.equal(ours[~ignored], others[~ignored])
            assert (ours[ignored] == 0).all()


@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("vocab", [1, 37, 20_011])
def test_gradient_from_known_results(
    launcher: RowLogprobLauncher, dtype: torch.dtype, vocab: int, transform: str
) -> None:
    case, truth, _ = solved(dtype, 5, vocab, transform)
    direct, grad = poisoned(case), poisoned(case)
    known = run(launcher, case, direct, entropy=False)
    case_again = replace(case, targets=case.targets.clone())
    case_again.targets[3] = IGNORE_INDEX
    result = launcher(case.logits, case_again.targets, grad_out=grad, known=known, **case.options())
    assert result.logp is known.logp and result.lse is known.lse
    assert (grad[3] == 0).all()
    kept = torch.tensor([0, 1, 2, 4])
    tiny = 4 * torch.finfo(dtype).eps * float(truth[3].abs().max())
    assert error(grad[kept], truth[3][kept]) <= 2 * error(direct[kept], truth[3][kept]) + tiny


@pytest.mark.parametrize("offset", [1e2, 1e4, -1e4])
def test_gradient_from_known_results_of_large_logits(launcher: RowLogprobLauncher, offset: float) -> None:
    case = make_case(torch.float32, 6, 1000)
    case.logits.add_(offset)
    case.logits[1, case.targets[1]] = float("-inf")
    case.logits[2, 5:] = float("-inf")
    case.targets[2], case.targets[3] = 700, 1000
    known = launcher(case.logits, case.targets)
    grad = poisoned(case)
    launcher(case.logits, case.targets, grad_out=grad, known=known)
    probs = case.logits.double().softmax(1)
    onehot = torch.nn.functional.one_hot(case.targets, 1001)[:, :1000]
    exact = [0, 4, 5]
    assert error(grad[exact], (probs - onehot)[exact]) < 2e-6
    # Without a target that is anywhere, the log-sum-exp is all there is: as exact as it is.
    assert error(grad[1:4], (probs - onehot)[1:4]) < 1e-6 * abs(offset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_out": None}, r"grad_out: expected a tensor to fill, as the results are known, got None"),
        ({"entropy": True}, r"entropy: expected False, as the results are known, got True"),
        ({"known": RowLogprob(torch.zeros(2), torch.zeros(3), None)}, r"known\.logp: expected "),
        ({"known": RowLogprob(torch.zeros(3), torch.zeros(3).double(), None)}, r"known\.lse: expected dtype"),
    ],
)
def test_known_results_that_do_not_fit_are_refused(
    launcher: RowLogprobLauncher, change: dict[str, Any], message: str
) -> None:
    case = make_case(torch.float32, 3, 7)
    options = {"grad_out": poisoned(case), "known": RowLogprob(torch.zeros(3), torch.zeros(3), None), **change}
    with pytest.raises(ValueError, match=message):
        launcher(case.logits, case.targets, **options)
