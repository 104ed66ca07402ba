"""The native LM head, forward and backward, against plain float64 on the same inputs."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if importlib.util.find_spec("robust_dpo._cpu") is None:
    pytest.skip("the native CPU extension is not built", allow_module_level=True)

from robust_dpo.kernels.linear_head_cpu import Tile, head_backward, head_forward, unsupported_reason
from robust_dpo.kernels.row_logprob import RowLogprob

DTYPES = [torch.float32, torch.bfloat16]
TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"logit_scale": 0.37},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "all": {"logit_scale": -1.3, "bias": True, "softcap": 30.0},
}
# Around the sizes of strips (8), vectors (16), panels (48), blocks of the vocabulary (256) and of hidden words (768).
SHAPES = [
    (1, 1, 1),
    (1, 7, 31),
    (7, 64, 1000),
    (49, 577, 257),
    (130, 576, 1000),
    (33, 48, 8),
    (17, 1601, 250),
    (5, 7, 50257),
]
NAN = float("nan")
INFINITY = float("inf")


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def shape_id(value: object) -> str | None:
    return "n{}-H{}-V{}".format(*value) if isinstance(value, tuple) else None


@pytest.fixture(params=DTYPES, ids=dtype_id)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    reason = unsupported_reason(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Values:
    """Results of a head, whoever computed them."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


@dataclass(frozen=True)
class Case:
    x: Tensor
    weight: Tensor
    targets: Tensor
    coefficients: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def plain(self, dtype: torch.dtype, *, magnitude: bool = False) -> Values:
        """The formulas, evaluated in `dtype`; with `magnitude` the sizes of what is added up."""
        x, weight = self.x.to(dtype), self.weight.to(dtype)
        z = x @ weight.T
        if self.bias is not None:
            z = z + self.bias.to(dtype)
        logits = z * self.logit_scale
        derivative = torch.full_like(z, self.logit_scale)
        if self.softcap is not None:
            capped = torch.tanh(logits / self.softcap)
            logits, derivative = capped * self.softcap, derivative * (1 - capped**2)
        rows = torch.arange(len(x))
        log_probs = logits.log_softmax(1)
        logp = log_probs[rows, self.targets]
        probs = log_probs.exp()
        entropy = -(probs * log_probs).masked_fill(probs == 0, 0.0).sum(1)
        g = probs.index_put((rows, self.targets), torch.expm1(logp)) * derivative * self.coefficients.to(dtype)[:, None]
        if magnitude:
            g, weight, x = g.abs(), weight.abs(), x.abs()
            # A log-prob is a difference of logits, and inherits their error.
            logp = entropy = logits.logsumexp(1).abs() + logp.abs()
        return Values(logp, logits.logsumexp(1), entropy, g @ weight, g.T @ x, g.sum(0))

    def native(self, spare_rows: int = 0) -> Values:
        """The kernel; everything that it overwrites is NaN before."""
        tile = poisoned_tile(self, spare_rows)
        forward = head_forward(self.x, self.weight, self.targets, tile=tile, entropy=True, **self.options)
        assert forward.entropy is not None
        grad_x = torch.full(self.x.shape, NAN)
        grad_weight, grad_bias = torch.zeros(self.weight.shape), torch.zeros(len(self.weight))
        self.backward(tile, forward, grad_x=grad_x, grad_weight=grad_weight, grad_bias=grad_bias)
        return Values(forward.logp, forward.lse, forward.entropy, grad_x, grad_weight, grad_bias)

    def backward(self, tile: Tile, forward: RowLogprob, **gradients: Tensor | None) -> None:
        coefficients = self.coefficients
        head_backward(tile, self.x, self.weight, self.targets, forward.lse, coefficients, **gradients, **self.options)


def poisoned_tile(case: Case, spare_rows: int = 0) -> Tile:
    tile = Tile.allocate(len(case.x) + spare_rows, len(case.weight), case.x.dtype)
    for part in (tile.values, tile.references, tile.target_logp, tile.target_derivative):
        part.fill_(NAN)
    return tile


def make_case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    bias: bool = False,
    spread: float = 2.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Case:
    """Random inputs whose logits have standard deviation `spread`."""
    rows, hidden, vocab = shape
    return Case(
        x=torch.randn(rows, hidden).to(dtype),
        weight=(torch.randn(vocab, hidden) * (spread / hidden**0.5)).to(dtype),
        targets=torch.randint(vocab, (rows,)),
        coefficients=torch.randn(rows),
        bias=torch.randn(vocab) if bias else None,
        softcap=softcap,
        logit_scale=logit_scale,
    )


def relative_error(values: Tensor, exact: Tensor) -> float:
    """In the L2 norm."""
    assert values.shape == exact.shape
    return float((values.double() - exact).norm() / exact.norm().clamp(min=1e-30)) if exact.numel() else 0.0


def assert_close(values: Values, case: Case, gradient_budget: float = INFINITY) -> None:
    """Errors at most twice those of PyTorch in fp32, and what rounding must be granted to any sum.

    In bf16 a probability is rounded twice, by at most 2⁻⁸ of its size each time; over large sums that averages out, so
    there `gradient_budget` bounds the relative error as well.
    """
    exact, plain = case.plain(torch.float64), case.plain(torch.float32)
    magnitude = case.plain(torch.float64, magnitude=True)
    for name in ("logp", "lse", "entropy", "grad_x", "grad_weight", "grad_bias"):
        truth, ours = getattr(exact, name), getattr(values, name)
        assert ours.shape == truth.shape
        grant = 2**-7 if name.startswith("grad") and case.x.dtype == torch.bfloat16 else 5e-6
        allowed = 2 * (getattr(plain, name) - truth).norm() + grant * getattr(magnitude, name).norm()
        assert (ours - truth).norm() <= allowed, name
        assert not name.startswith("grad") or relative_error(ours, truth) <= gradient_budget, name


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_matches_float64(shape: tuple[int, int, int], transform: str, dtype: torch.dtype) -> None:
    case = make_case(shape, dtype, **TRANSFORMS[transform])
    assert_close(case.native(), case)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 120), st.integers(1, 100), st.integers(1, 600)),
    transform=st.sampled_from(sorted(TRANSFORMS)),
    spare_rows=st.integers(0, 40),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_matches_float64_at_any_size(
    shape: tuple[int, int, int], transform: str, spare_rows: int, dtype: torch.dtype
) -> None:
    reason = unsupported_reason(dtype)
    if reason is not None:
        pytest.skip(reason)
    case = make_case(shape, dtype, **TRANSFORMS[transform])
    assert_close(case.native(spare_rows), case)


def test_more_rows_than_a_group(dtype: torch.dtype) -> None:
    case = make_case((1100, 33, 520), dtype)
    assert_close(case.native(), case, gradient_budget=1.5e-3)


def test_bf16_is_far_more_exact_than_bf16_logits() -> None:
    if (reason := unsupported_reason(torch.bfloat16)) is not None:
        pytest.skip(reason)
    case = make_case((256, 576, 5000), torch.bfloat16)
    exact, plain, ours = case.plain(torch.float64), case.plain(torch.bfloat16), case.native()
    for name in ("logp", "grad_x", "grad_weight"):
        truth = getattr(exact, name)
        assert relative_error(getattr(ours, name), truth) < 0.2 * relative_error(getattr(plain, name), truth)
        assert relative_error(getattr(ours, name), truth) < 1e-3


def test_confident_rows_keep_their_small_gradients(dtype: torch.dtype) -> None:
    case = make_case((64, 96, 700), dtype, spread=1.0)
    lead = torch.zeros(700)
    lead[3] = 10.0
    case = replace(case, bias=lead, targets=torch.full((64,), 3))
    assert float(case.plain(torch.float64).logp.exp().mean()) > 0.9
    assert_close(case.native(), case, gradient_budget=1e-2)


def test_no_tile_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = make_case((50, 65, 1003), dtype, bias=True)
    kept = head_forward(case.x, case.weight, case.targets, tile=poisoned_tile(case), **case.options)
    bare = head_forward(case.x, case.weight, case.targets, **case.options)
    assert torch.equal(kept.logp, bare.logp)
    assert torch.equal(kept.lse, bare.lse)
    assert bare.entropy is None


@pytest.mark.parametrize(
    "masked",
    [range(0, 9), range(8, 264), range(0, 300), range(500, 700)],
    ids=["first strip", "past the first strip", "first block", "up to the end"],
)
@pytest.mark.parametrize("mask", [-INFINITY, -1e9])
def test_masked_vocabulary(masked: range, mask: float, dtype: torch.dtype) -> None:
    case = make_case((20, 33, 700), dtype)
    bias = torch.randn(700)
    bias[masked.start : masked.stop] = mask
    allowed = [j for j in range(700) if j not in masked]
    case = replace(case, bias=bias, targets=torch.tensor(allowed)[torch.randint(len(allowed), (20,))])
    values = case.native()
    assert_close(values, case)
    assert not values.grad_weight[masked.start : masked.stop].any()


@pytest.mark.parametrize("step", [0.5, 30.0, 100.0], ids=lambda step: f"step {step}")
@pytest.mark.parametrize("sign", [1, -1], ids=["rising", "falling"])
def test_logits_that_run_away_from_the_first_ones(sign: int, step: float, dtype: torch.dtype) -> None:
    case = make_case((20, 33, 600), dtype)
    case = replace(case, bias=sign * step * torch.arange(600.0), coefficients=torch.rand(20) + 0.5)
    assert_close(case.native(), case)


@pytest.mark.parametrize("spread", [1e2, 1e4])
def test_huge_logits(spread: float, dtype: torch.dtype) -> None:
    case = make_case((40, 64, 900), dtype, spread=spread)
    values, exact = case.native(), case.plain(torch.float64)
    assert relative_error(values.lse, exact.lse) < 1e-6
    # Logits have an error of 1e-6 of their size, and the probabilities' relative error is that.
    assert relative_error(values.grad_x, exact.grad_x) < 1e-5 * spread + 4e-3
    assert values.grad_weight.isfinite().all()


def test_saturated_softcap(dtype: torch.dtype) -> None:
    case = make_case((10, 16, 300), dtype, spread=1000.0, softcap=5.0)
    values, exact = case.native(), case.plain(torch.float64)
    # 1 - tanh² has an absolute error of 1e-7, however small it is.
    per_element = 1e-5 if dtype == torch.float32 else 2**-7
    largest = case.weight.abs().max() * case.coefficients.abs().max()
    assert (values.grad_x - exact.grad_x).abs().max() <= per_element * largest
    assert relative_error(values.logp, exact.logp) < 1e-6


def test_target_of_probability_zero(dtype: torch.dtype) -> None:
    case = make_case((12, 16, 40), dtype)
    bias = torch.zeros(40)
    bias[7] = -INFINITY
    values = replace(case, bias=bias, targets=torch.full((12,), 7)).native()
    assert torch.equal(values.logp, torch.full((12,), -INFINITY))
    torch.testing.assert_close(values.grad_bias[7], -case.coefficients.sum())


def test_nothing_allowed_is_nan(dtype: torch.dtype) -> None:
    case = replace(make_case((3, 16, 40), dtype), bias=torch.full((40,), -INFINITY))
    forward = head_forward(case.x, case.weight, case.targets, **case.options)
    assert torch.equal(forward.lse, torch.full((3,), -INFINITY))
    assert forward.logp.isnan().all()


@pytest.mark.parametrize("bad", [NAN, INFINITY])
def test_a_row_that_is_not_finite_spoils_only_itself(bad: float, dtype: torch.dtype) -> None:
    case = make_case((70, 40, 600), dtype)
    case.x[50, 11] = bad
    values = case.native()
    for part in (values.logp, values.lse, values.entropy, values.grad_x.sum(1)):
        assert part.isnan().nonzero().flatten().tolist() == [50]


def test_target_outside_the_vocabulary_is_nan(dtype: torch.dtype) -> None:
    case = make_case((4, 8, 20), dtype)
    forward = head_forward(case.x, case.weight, torch.tensor([-100, 20, 19, 0]))
    assert forward.logp.isnan().tolist() == [True, True, False, False]
    assert forward.lse.isfinite().all()


@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)])
def test_each_combination_of_gradients(wanted: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    case = make_case((60, 70, 530), dtype, bias=True)
    everything = case.native()
    tile = poisoned_tile(case)
    forward = head_forward(case.x, case.weight, case.targets, tile=tile, **case.options)
    names = ("grad_x", "grad_weight", "grad_bias")
    shapes = (case.x.shape, case.weight.shape, torch.Size([530]))
    gradients = {
        name: torch.zeros(shape) if want else None for name, shape, want in zip(names, shapes, wanted, strict=True)
    }
    case.backward(tile, forward, **gradients)
    for name, gradient in gradients.items():
        if gradient is not None:
            assert torch.equal(gradient, getattr(everything, name)), name


def test_weight_and_bias_gradients_are_added_and_backward_repeats(dtype: torch.dtype) -> None:
    case = make_case((60, 70, 530), dtype, bias=True)
    once = case.native()
    tile = poisoned_tile(case)
    forward = head_forward(case.x, case.weight, case.targets, tile=tile, **case.options)
    grad_x = torch.full(case.x.shape, NAN)
    grad_weight, grad_bias = torch.ones(case.weight.shape), torch.ones(530)
    for _ in range(2):
        case.backward(tile, forward, grad_x=grad_x, grad_weight=grad_weight, grad_bias=grad_bias)
    assert torch.equal(grad_x, once.grad_x)
    torch.testing.assert_close(grad_weight, 1 + 2 * once.grad_weight)
    torch.testing.assert_close(grad_bias, 1 + 2 * once.grad_bias)


def test_row_strides(dtype: torch.dtype) -> None:
    case = make_case((37, 50, 301), dtype, bias=True)
    exact = case.native()
    x, weight = torch.full((37, 61), NAN, dtype=dtype), torch.full((301, 53), NAN, dtype=dtype)
    x[:, 4:54], weight[:, 1:51] = case.x, case.weight
    strided = replace(case, x=x[:, 4:54], weight=weight[:, 1:51])
    tile = poisoned_tile(strided)
    forward = head_forward(strided.x, strided.weight, strided.targets, tile=tile, **strided.options)
    assert torch.equal(forward.logp, exact.logp)
    grad_x, grad_weight = torch.zeros(37, 57), torch.zeros(301, 59)
    strided.backward(tile, forward, grad_x=grad_x[:, 3:53], grad_weight=grad_weight[:, 5:55])
    assert torch.equal(grad_x[:, 3:53], exact.grad_x)
    assert torch.equal(grad_weight[:, 5:55], exact.grad_weight)
    for outside in (grad_x[:, :3], grad_x[:, 53:], grad_weight[:, :5], grad_weight[:, 55:]):
        assert not outside.any()


def test_no_rows(dtype: torch.dtype) -> None:
    case = make_case((0, 8, 20), dtype)
    values = case.native()
    assert values.logp.shape == values.lse.shape == values.entropy.shape == (0,)
    assert not values.grad_weight.any()


def test_runs_agree_in_every_bit(dtype: torch.dtype) -> None:
    case = make_case((150, 70, 3000), dtype, bias=True)
    first = case.native()
    for _ in range(3):
        again = case.native()
        for name in Values.__dataclass_fields__:
            assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.usefixtures("restore_threads")
def test_thread_counts(dtype: torch.dtype) -> None:
    case = make_case((150, 70, 3000), dtype, bias=True)
    torch.set_num_threads(1)
    single = case.native()
    assert_close(single, case)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        values = case.native()
        for name in ("logp", "lse", "entropy", "grad_weight", "grad_bias"):
            assert torch.equal(getattr(values, name), getattr(single, name)), name
        torch.testing.assert_close(values.grad_x, single.grad_x, rtol=1e-4, atol=1e-5)


def test_concurrent_calls(dtype: torch.dtype) -> None:
    cases = [make_case((40, 50, 900), dtype) for _ in range(4)]
    expected = [case.native() for case in cases]
    results: dict[int, Values] = {}

    def work(index: int) -> None:
        for _ in range(5):
            results[index] = cases[index].native()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, values in enumerate(expected):
        assert torch.equal(results[index].grad_weight, values.grad_weight)
        assert torch.equal(results[index].logp, values.logp)


def test_works_in_a_forked_child(dtype: torch.dtype) -> None:
    script = f"""
        import os, torch
        from robust_dpo.kernels.linear_head_cpu import head_forward
        torch.set_num_threads(2)
        x, weight = torch.randn(64, 32).to({dtype}), torch.randn(2000, 32).to({dtype})
        targets = torch.randint(2000, (64,))
        expected = head_forward(x, weight, targets).logp
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(head_forward(x, weight, targets).logp, expected) else 3)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_more_than_2_to_the_31_logits(dtype: torch.dtype) -> None:
    rows, vocab = 15000, 151936
    case = make_case((rows, 2, vocab), dtype)
    forward = head_forward(case.x, case.weight, case.targets)
    last = replace(case, x=case.x[-20:], targets=case.targets[-20:], coefficients=case.coefficients[-20:])
    exact = last.plain(torch.float64)
    torch.testing.assert_close(forward.logp[-20:].double(), exact.logp, rtol=1e-5, atol=1e-5)


def arguments(**changes: Any) -> dict[str, Any]:
    given = {"x": torch.randn(4, 8), "weight": torch.randn(20, 8), "targets": torch.zeros(4, dtype=torch.int64)}
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(4)}, r"x: expected two dimensions, got \(4,\)"),
        ({"x": torch.randn(8, 4).T}, "x: expected unit stride within a row"),
        ({"weight": torch.randn(20, 9)}, r"weight: expected shape \[V, 8\]"),
        ({"weight": torch.randn(0, 8)}, "weight: expected shape .* with V > 0"),
        ({"weight": torch.randn(20, 8).bfloat16()}, "weight: expected dtype torch.float32, as x"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "targets: expected dtype torch.int64"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"targets: expected shape \[4\]"),
        ({"bias": torch.zeros(19)}, r"bias: expected shape \[20\]"),
        ({"softcap": 0.0}, "softcap: expected a positive number or None"),
        ({"tile": Tile.allocate(3, 20, torch.float32)}, "tile: expected .* at least 4 rows, got .* 3 rows"),
        ({"tile": Tile.allocate(4, 21, torch.float32)}, "tile: expected .* 20 columns"),
        ({"x": torch.randn(4, 8, device="meta")}, "x: expected a tensor on the CPU, got meta"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    if (reason := unsupported_reason(torch.float32)) is not None:
        pytest.skip(reason)
    with pytest.raises(ValueError, match=message):
        head_forward(**arguments(**changes))


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"grad_x": torch.zeros(4, 8).bfloat16()}, "grad_x: expected dtype torch.float32"),
        ({"grad_weight": torch.zeros(8, 20)}, r"grad_weight: expected shape \[20, 8\]"),
        ({"grad_weight": torch.zeros(8, 20).T}, "grad_weight: expected unit stride"),
        ({"grad_weight": torch.zeros(1, 8).expand(20, 8)}, "grad_weight: expected a row stride of at least 8"),
        ({"grad_bias": torch.zeros(40)[::2]}, "grad_bias: expected unit stride"),
    ],
)
def test_refuses_gradients(gradients: dict[str, Tensor], message: str) -> None:
    if (reason := unsupported_reason(torch.float32)) is not None:
        pytest.skip(reason)
    given = arguments(tile=Tile.allocate(4, 20, torch.float32))
    forward = head_forward(**given)
    with pytest.raises(ValueError, match=message):
        head_backward(**given, lse=forward.lse, coefficients=torch.ones(4), **gradients)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((-1, 8, torch.float32), "max_rows"), ((1, 0, torch.float32), "vocab"), ((1, 8, torch.float64), "dtype")],
)
def test_refuses_tiles(sizes: tuple[int, int, torch.dtype], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tile.allocate(*sizes)


def test_tile_takes_the_bytes_that_it_says(dtype: torch.dtype) -> None:
    tile = Tile.allocate(130, 1001, dtype)
    parts = (tile.values, tile.references, tile.target_logp, tile.target_derivative)
    assert Tile.bytes_needed(130, 1001, dtype) == sum(part.numel() * part.element_size() for part in parts)


def test_unsupported_is_said_and_not_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float16" in str(unsupported_reason(torch.float16))
    monkeypatch.setenv("ROBUST_DPO_CPU_ISA", "generic")
    assert "avx512" in str(unsupported_reason(torch.float32))
    assert "avx512_bf16" in str(unsupported_reason(torch.bfloat16))
    with pytest.raises(RuntimeError, match="generic is in use"):
        head_forward(**arguments())
