"""sequence_logps from hidden states and from logits, against float64 autograd of the reference."""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import pytest
import torch
from problems import Problem, make_problem, relative_error, require_backend
from torch import Tensor

from robust_dpo import SequenceLogps, reference, sequence_logps, sequence_logps_from_logits
from robust_dpo.dispatch import get_row_logprob
from robust_dpo.kernels.row_logprob import RowLogprob, RowLogprobLauncher
from robust_dpo.ops.dense_logits import DenseRows, sequence_sums

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 4.0},
    "scale": {"logit_scale": 0.5},
    "softcap_scale": {"softcap": 4.0, "logit_scale": 0.5},
}


def dtype_id(value: object) -> str:
    return str(value).removeprefix("torch.")


def problem_of(sizes: list[int], **options: Any) -> Problem:
    """A problem whose keyword arguments are those of sequence_logps."""
    problem = make_problem(sizes, reference="none", **options)
    del problem.kwargs["group_sizes"]
    return problem


def expected(logits: Tensor, targets: Tensor, seq_lens: Tensor | None) -> SequenceLogps:
    """By the reference, from transformed logits."""
    flat, tokens = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    logp, _, entropy = reference.row_logprob(flat, tokens.clamp(min=0))
    kept = tokens != -100
    zero = torch.zeros_like(logp)
    token_logps, entropies = torch.where(kept, logp, zero), torch.where(kept, entropy, zero)
    logps = reference.sequence_logps(logits, targets, seq_lens)[0]
    return SequenceLogps(logps, token_logps.view(targets.shape), entropies.view(targets.shape))


def logits_of(problem: Problem, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    return reference.transformed_logits(
        problem.hidden, problem.weight, problem.kwargs.get("bias"), softcap, logit_scale
    )


def gradients(result: SequenceLogps, factors: SequenceLogps, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a weighted sum of sequence and token log-probs."""
    dtype = result.logps.dtype
    total = (result.logps * factors.logps.to(dtype)).sum() + (result.token_logps * factors.token_logps.to(dtype)).sum()
    return torch.autograd.grad(total, leaves)


def random_factors(like: SequenceLogps) -> SequenceLogps:
    return SequenceLogps(torch.randn_like(like.logps), torch.randn_like(like.token_logps), None)


@pytest.mark.parametrize("backend", ["torch", "cpu", "auto"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_matches_the_reference(packed: bool, head: str, backend: str) -> None:
    require_backend(backend)
    problem = problem_of([3, 2, 4], packed=packed, bias=True).to(torch.float64)
    truth = expected(logits_of(problem, **HEADS[head]), problem.targets, problem.kwargs.get("seq_lens"))
    options = {"per_token": True, "entropy": True, "backend": backend, "chunk_bytes": 1, **HEADS[head]}
    result = sequence_logps(*problem.args, **problem.kwargs, **options)
    torch.testing.assert_close(result.logps, truth.logps)
    torch.testing.assert_close(result.token_logps, truth.token_logps)
    torch.testing.assert_close(result.entropy, truth.entropy)
    assert result.entropy is not None
    assert not result.entropy.requires_grad
    factors, leaves = random_factors(truth), list(problem.leaves.values())
    for one, two in zip(gradients(result, factors, leaves), gradients(truth, factors, leaves), strict=True):
        assert relative_error(one, two) < 1e-11


@pytest.mark.parametrize("backend", ["torch", "cpu", "auto"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.usefixtures("logits_route")
def test_from_logits_matches_the_reference(packed: bool, head: str, backend: str) -> None:
    require_backend(backend)
    problem = problem_of([3, 2, 4], packed=packed).to(torch.float64)
    logits = logits_of(problem).detach().requires_grad_()
    seq_lens = problem.kwargs.get("seq_lens")
    truth = expected(
        reference.cap(logits * HEADS[head].get("logit_scale", 1.0), HEADS[head].get("softcap")),
        problem.targets,
        seq_lens,
    )
    options = {"per_token": True, "entropy": True, "backend": backend, "chunk_bytes": 1, **HEADS[head]}
    result = sequence_logps_from_logits(logits, problem.targets, seq_lens=seq_lens, **options)
    for one, two in zip(result, truth, strict=True):
        torch.testing.assert_close(one, two)
    factors = random_factors(truth)
    one, two = (gradients(each, factors, [logits])[0] for each in (result, truth))
    assert relative_error(one, two) < 1e-12
    # Rows that do not count have no gradient, to the bit.
    assert not one[problem.targets == -100].any()


@pytest.mark.parametrize("backend", ["torch", "cpu", "auto"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("vocab", [31, 1000])
def test_error_budget(vocab: int, dtype: torch.dtype, backend: str) -> None:
    require_backend(backend)
    errors: dict[str, list[tuple[float, float]]] = {}
    for _ in range(4):
        problem = problem_of([4, 3], vocab=vocab, width=48, longest=24, bias=True).to(dtype)
        wide = problem.to(torch.float64)
        truth = expected(logits_of(wide), wide.targets, None)
        plain = expected(logits_of(problem), problem.targets, None)
        ours = sequence_logps(*problem.args, **problem.kwargs, per_token=True, entropy=True, backend=backend)
        factors = random_factors(truth)
        assert all(value is not None and value.dtype == torch.float32 for value in ours)
        names = ["logps", "token_logps", "entropy", *problem.leaves]
        true_values = [*truth, *gradients(truth, factors, list(wide.leaves.values()))]
        plain_values = [*plain, *gradients(plain, factors, list(problem.leaves.values()))]
        our_values = [*ours, *gradients(ours, factors, list(problem.leaves.values()))]
        for name, mine, theirs, true in zip(names, our_values, plain_values, true_values, strict=True):
            errors.setdefault(name, []).append((relative_error(mine, true), relative_error(theirs, true)))
    tiny = 64 * torch.finfo(torch.float32).eps + 0.5 * torch.finfo(dtype).eps
    for name, pairs in errors.items():
        mine, theirs = torch.tensor(pairs, dtype=torch.float64).square().mean(0).sqrt().tolist()
        assert mine <= 2 * theirs + tiny, f"{name}: error {mine:.2e}, plain PyTorch {theirs:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "view", ["contiguous", "shifted", "column_major", "every_other_row", "expanded", "last_of_many", "sequence_first"]
)
@pytest.mark.parametrize("holes", [False, True], ids=["every_row_counts", "holes"])
@pytest.mark.parametrize("backend", ["torch", "cpu", "auto"])
@pytest.mark.usefixtures("logits_route")
def test_strided_logits(backend: str, holes: bool, view: str, dtype: torch.dtype) -> None:
    require_backend(backend)
    batch, length, vocab = 3, 7, 19
    base = torch.randn(batch, length, vocab, dtype=torch.float64).to(dtype)
    strided = {
        "contiguous": lambda: base,
        "shifted": lambda: torch.cat([base, torch.full((batch, 1, vocab), math.nan, dtype=dtype)], 1)[:, :-1],
        "column_major": lambda: base.transpose(1, 2).contiguous().transpose(1, 2),
        "every_other_row": lambda: base.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda: base[:, :1].expand(batch, length, vocab),
        "last_of_many": lambda: torch.cat([torch.full((batch, 9, vocab), math.nan, dtype=dtype), base], 1)[:, -length:],
        "sequence_first": lambda: base.transpose(0, 1).contiguous().transpose(0, 1),
    }[view]()
    targets = torch.randint(0, vocab, (batch, length))
    if holes:
        targets[:, ::3] = -100
    results = []
    for logits in (strided, strided.contiguous().clone()):
        leaf = logits.detach().requires_grad_()
        result = sequence_logps_from_logits(
            leaf, targets, per_token=True, entropy=True, backend=backend, chunk_bytes=1, softcap=9.0
        )
        results.append([*result, torch.autograd.grad(result.logps.square().sum(), leaf)[0]])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each launch of the row kernel, where logits are taken as on a GPU."""
    module, rows = importlib.import_module("robust_dpo.ops.logits_logps"), []

    def counted(*arguments: Any) -> RowLogprobLauncher:
        launcher = get_row_logprob(*arguments)

        def launch(logits: Tensor, *rest: Any, **options: Any) -> RowLogprob:
            rows.append(len(logits))
            return launcher(logits, *rest, **options)

        return launch

    monkeypatch.setattr(module, "takes_all_rows", lambda device: True)
    monkeypatch.setattr(module, "get_row_logprob", counted)
    return rows


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("form", ["padded", "shifted", "packed"])
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_all_rows_go_in_one_launch_where_nothing_is_read_back(
    backend: str, form: str, dtype: torch.dtype, launches: list[int]
) -> None:
    require_backend(backend)
    problem = problem_of([3, 2], vocab=41, packed=form == "packed").to(dtype)
    logits, seq_lens = logits_of(problem).detach(), problem.kwargs.get("seq_lens")
    if form == "shifted":
        logits = torch.cat([logits, torch.full_like(logits[:, :1], math.nan)], 1)[:, :-1]
    exact, plain = (logits.to(each, copy=True).requires_grad_() for each in (torch.float64, torch.float32))
    leaf = logits.detach().requires_grad_()
    truth, single = (expected(each, problem.targets, seq_lens) for each in (exact, plain))
    result = sequence_logps_from_logits(
        leaf, problem.targets, seq_lens=seq_lens, per_token=True, entropy=True, backend=backend
    )
    factors = random_factors(truth)
    theirs = [*single, *gradients(single, factors, [plain])]
    for mine, other, true in zip(
        [*result, *gradients(result, factors, [leaf])],
        theirs,
        [*truth, *gradients(truth, factors, [exact])],
        strict=True,
    ):
        rounding = torch.finfo(mine.dtype).eps + 16 * torch.finfo(torch.float32).eps
        assert relative_error(mine, true) <= 2 * relative_error(other, true) + rounding
    rows = problem.targets.numel() + (len(problem.targets) - 1 if form == "shifted" else 0)
    assert launches == [rows, rows]  # forward and backward


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@pytest.mark.usefixtures("launches")
def test_what_is_wrong_and_not_read_back_makes_nan(backend: str) -> None:
    require_backend(backend)
    logits, targets = torch.randn(3, 4, 11), torch.randint(0, 11, (3, 4))
    targets[1, 2] = 11
    assert sequence_logps_from_logits(logits, targets, backend=backend).isnan().tolist() == [False, True, False]
    targets[1, 2] = -100
    packed = logits.view(12, 11), targets.view(12)
    for lens in ([4, 4, 3], [4, 4, 5], [8, -4, 8]):
        with pytest.raises(ValueError, match="seq_lens: expected "):
            sequence_logps_from_logits(*packed, seq_lens=torch.tensor(lens), backend=backend)
        # Lengths on a device are not read, so no error can say what is wrong with them.
        assert sequence_sums(torch.ones(12), torch.tensor(lens).cumsum(0)).isnan().all()
    lens = torch.tensor([4, 0, 8])
    assert sequence_logps_from_logits(*packed, seq_lens=lens, backend=backend).isfinite().all()


def test_the_gradient_of_the_last_positions_takes_no_more_room_than_they() -> None:
    logits, targets = torch.empty(4, 4096, 1000, device="meta"), torch.zeros(4, 128, dtype=torch.int64, device="meta")
    for part, rows in ((logits[:, -128:], 4 * 128), (logits[:, -129:-1], 4 * 128)):
        dense = DenseRows.of(part, targets)
        assert len(dense.targets) == rows
        assert dense.new_gradient(part).untyped_storage().nbytes() == rows * 1000 * 4
    shifted = DenseRows.of(logits[:, :-1], torch.zeros(4, 4095, dtype=torch.int64, device="meta"))
    assert not shifted.is_copied


def test_the_gradient_of_logits_does_not_touch_the_logits() -> None:
    logits = torch.randn(2, 5, 11, requires_grad=True)
    before = logits.detach().clone()
    sequence_logps_from_logits(logits, torch.randint(0, 11, (2, 5))).sum().backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("per_token", "entropy"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.usefixtures("logits_route")
def test_what_is_returned(per_token: bool, entropy: bool) -> None:
    problem = problem_of([2, 2]).to(torch.float32)
    logits = logits_of(problem).detach()
    for result in (
        sequence_logps(*problem.args, per_token=per_token, entropy=entropy),
        sequence_logps_from_logits(logits, problem.targets, per_token=per_token, entropy=entropy),
    ):
        assert isinstance(result, SequenceLogps) == (per_token or entropy)
        if isinstance(result, SequenceLogps):
            assert (result.entropy is not None) == entropy
            torch.testing.assert_close(result.token_logps.sum(1), result.logps)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_every_combination_of_requires_grad(needs: tuple[bool, bool, bool]) -> None:
    problem = problem_of([3, 2], bias=True).to(torch.float64)
    leaves = list(problem.leaves.values())
    truth = expected(logits_of(problem), problem.targets, None)
    factors = random_factors(truth)
    wanted = gradients(truth, factors, leaves)
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    result = sequence_logps(*problem.args, per_token=True, **problem.kwargs)
    assert result.logps.requires_grad == any(needs)
    if any(needs):
        ((result.logps * factors.logps).sum() + (result.token_logps * factors.token_logps).sum()).backward()
    for leaf, need, gradient in zip(leaves, needs, wanted, strict=True):
        if need:
            assert relative_error(leaf.grad, gradient) < 1e-11
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("route", ["hidden", "logits"])
@pytest.mark.usefixtures("logits_route")
def test_backward_again_and_second_derivatives(route: str) -> None:
    problem = problem_of([2, 2]).to(torch.float64)
    leaf = problem.hidden if route == "hidden" else logits_of(problem).detach().requires_grad_()
    logps = sequence_logps(*problem.args) if route == "hidden" else sequence_logps_from_logits(leaf, problem.targets)
    first = torch.autograd.grad(logps.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(logps.sum(), leaf, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(logps.sum(), leaf, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.usefixtures("logits_route")
def test_no_tokens_at_all(packed: bool) -> None:
    problem = problem_of([2], packed=packed, bias=True).to(torch.float32)
    problem.targets[:] = -100
    result = sequence_logps(*problem.args, **problem.kwargs, per_token=True, entropy=True)
    assert result.logps.tolist() == [0, 0]
    assert not result.token_logps.any()
    result.logps.sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in problem.leaves.values())
    logits = torch.randn(2, 3, 5, requires_grad=True)
    sequence_logps_from_logits(logits, torch.full((2, 3), -100)).sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
@pytest.mark.usefixtures("logits_route")
def test_empty_shapes(shape: tuple[int, int]) -> None:
    targets = torch.zeros(shape, dtype=torch.int64)
    hidden = torch.randn(*shape, 6, requires_grad=True)
    logps = sequence_logps(hidden, torch.randn(5, 6), targets)
    assert logps.tolist() == [0.0] * shape[0]
    logps.sum().backward()
    assert sequence_logps_from_logits(torch.randn(*shape, 5), targets).tolist() == [0.0] * shape[0]


def test_packed_responses_of_length_zero() -> None:
    targets, lens = torch.randint(0, 5, (6,)), torch.tensor([0, 4, 0, 2, 0])
    logps = sequence_logps(torch.randn(6, 3), torch.randn(5, 3), targets, seq_lens=lens)
    assert (logps == 0).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("backend", ["torch", "cpu", "auto"])
@pytest.mark.parametrize("tile_dtype", [None, torch.float32], ids=dtype_id)
def test_autocast(tile_dtype: torch.dtype | None, backend: str) -> None:
    require_backend(backend)
    problem = problem_of([3, 2], vocab=257, width=48, longest=24).to(torch.float32)
    half = problem.to(torch.bfloat16)
    leaves, half_leaves = list(problem.leaves.values()), list(half.leaves.values())
    with torch.autocast("cpu", torch.bfloat16):
        logps = sequence_logps(*problem.args, tile_dtype=tile_dtype, backend=backend)
        inside = torch.autograd.grad(logps.sum(), leaves, retain_graph=True)
    outside = torch.autograd.grad(logps.sum(), leaves)
    plain = sequence_logps(*half.args, tile_dtype=tile_dtype, backend=backend)
    torch.testing.assert_close(logps, plain)
    for one, two, three in zip(inside, outside, torch.autograd.grad(plain.sum(), half_leaves), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)
        assert relative_error(one, three) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("head", ["plain", "softcap_scale"])
@pytest.mark.usefixtures("logits_route")
def test_gradcheck(head: str) -> None:
    problem = problem_of([2, 1], vocab=11, width=4, longest=3, bias=True).to(torch.float64)
    options: dict[str, Any] = {"per_token": True, "chunk_bytes": 1, **HEADS[head]}

    def from_hidden(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return sequence_logps(hidden, weight, problem.targets, bias=bias, **options)[:2]

    def from_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
        return sequence_logps_from_logits(logits, problem.targets, **options)[:2]

    assert torch.autograd.gradcheck(from_hidden, tuple(problem.leaves.values()))
    assert torch.autograd.gradcheck(from_logits, (logits_of(problem).detach().requires_grad_(),))
