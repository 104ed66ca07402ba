"""linear_preference_loss against float64 autograd of the reference: accuracy, layouts, gradients, chunks, parts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, make_problem, relative_error, require_backend
from torch import Tensor

import robust_dpo
from robust_dpo import DrDPO, Groups, KLRobust, Mean, reference
from robust_dpo.ops import objective
from robust_dpo.ops.gemm_head import GemmHead
from robust_dpo.ops.head import HeadGradients, LinearHead
from robust_dpo.robust import RobustObjective

linear_preference_loss = robust_dpo.linear_preference_loss
pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OBJECTIVES = {"mean": Mean(), "kl": KLRobust(lam=0.7), "dr_dpo": DrDPO(beta=0.6)}


def dtype_id(value: object) -> str:
    return str(value).removeprefix("torch.")


def expected(problem: Problem, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients by autograd of the reference, in the dtype of the problem."""
    options = {"robust": Mean(), **options}
    loss = reference.linear_preference_loss(*problem.args, **problem.kwargs, **options)
    leaves = list(problem.leaves.values())
    return loss.detach(), list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def computed(problem: Problem, **options: Any) -> tuple[robust_dpo.PreferenceOutput, list[Tensor]]:
    """Output and gradients of the operator."""
    output = linear_preference_loss(*problem.args, **problem.kwargs, **options)
    return output, list(torch.autograd.grad(output.loss, list(problem.leaves.values())))


def assert_exact(problem: Problem, tolerance: float = 1e-10, **options: Any) -> robust_dpo.PreferenceOutput:
    """The operator agrees with the reference in float64."""
    settings = ("chunk_bytes", "backend", "tile_dtype")
    wanted, wanted_grads = expected(problem, **{k: v for k, v in options.items() if k not in settings})
    output, grads = computed(problem, **options)
    assert relative_error(output.loss, wanted) < tolerance
    for name, grad, wanted_grad in zip(problem.leaves, grads, wanted_grads, strict=True):
        assert relative_error(grad, wanted_grad) < tolerance, name
    return output


# ---- accuracy


def assert_within_budget(problems: list[Problem], options: dict[str, Any], **how: Any) -> None:
    """err(ours) ≤ 2 err(plain PyTorch) + tiny, root mean squares over problems in one dtype, against float64."""
    dtype = problems[0].hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)
    errors: dict[str, list[tuple[float, float]]] = {}
    for problem in problems:
        truth = expected(problem.to(torch.float64), **options)
        plain = expected(problem, **options)
        output, grads = computed(problem, **how, **options)
        assert output.loss.dtype == wide
        assert all(gradient.dtype == dtype for gradient in grads)
        errors.setdefault("loss", []).append(
            (relative_error(output.loss, truth[0]), relative_error(plain[0], truth[0]))
        )
        for name, ours, theirs, true in zip(problem.leaves, grads, plain[1], truth[1], strict=True):
            errors.setdefault(name, []).append((relative_error(ours, true), relative_error(theirs, true)))
    # Sums of thousands of fp32 terms, and the rounding of a result to its dtype.
    tiny = 64 * torch.finfo(wide).eps + 0.5 * torch.finfo(dtype).eps
    for name, pairs in errors.items():
        ours, theirs = torch.tensor(pairs, dtype=torch.float64).square().mean(0).sqrt().tolist()
        assert ours <= 2 * theirs + tiny, f"{name}: error {ours:.2e}, plain PyTorch {theirs:.2e}"


@pytest.mark.parametrize("backend", ["torch", "cpu", "auto"])
@pytest.mark.parametrize("tile", ["default", "own", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("vocab", [31, 257, 1000])
def test_error_budget(vocab: int, dtype: torch.dtype, tile: str, backend: str) -> None:
    require_backend(backend)
    tile_dtype = {"default": None, "own": dtype, "float32": torch.float32}[tile]
    sizes = [2, 2, 3, 2, 2, 4]
    problems = [
        make_problem(sizes, vocab=vocab, width=48, longest=24, bias=True, calibration=True).to(dtype) for _ in range(5)
    ]
    options = {"loss": "ipo", "beta": 0.5, "robust": KLRobust(lam=2.0)}
    assert_within_budget(problems, options, tile_dtype=tile_dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
def test_error_budget_at_a_real_vocabulary(dtype: torch.dtype) -> None:
    problem = make_problem([2, 2], vocab=50257, width=32, longest=24, bias=True).to(dtype)
    assert_within_budget([problem], {})


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_an_fp32_tile_beats_a_bf16_one(backend: str) -> None:
    require_backend(backend)
    problem = make_problem([2] * 8, vocab=1000, width=64, longest=24, reference="cached").to(torch.bfloat16)
    truth = expected(problem.to(torch.float64), loss="ipo", beta=0.5)[0]
    wide, narrow = (
        relative_error(computed(problem, loss="ipo", beta=0.5, backend=backend, tile_dtype=tile)[0].loss, truth)
        for tile in (torch.float32, torch.bfloat16)
    )
    assert wide < 1e-4
    assert wide < narrow / 5


@pytest.mark.parametrize("backend", ["torch", "cpu", "auto"])
@pytest.mark.parametrize("tile_dtype", [None, torch.float32, torch.bfloat16], ids=dtype_id)
def test_autocast_has_the_accuracy_of_its_dtype(tile_dtype: torch.dtype | None, backend: str) -> None:
    require_backend(backend)
    problem = make_problem([2, 2, 3], vocab=257, width=48, longest=24, bias=True).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, grads = computed(problem, tile_dtype=tile_dtype, backend=backend)
        again = linear_preference_loss(*problem.args, tile_dtype=tile_dtype, backend=backend, **problem.kwargs)
        again.loss.backward()
    assert all(grad.dtype == torch.float32 for grad in grads)
    same = problem.to(torch.bfloat16)
    # The bias is not part of a product, so autocast leaves it as it is.
    same.kwargs["bias"] = problem.kwargs["bias"].detach().clone().requires_grad_()
    plain, plain_grads = computed(same, tile_dtype=tile_dtype, backend=backend)
    assert relative_error(output.loss, plain.loss) < 1e-6
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        # The gradients of the bf16 leaves are rounded once more.
        assert relative_error(grad, plain_grad) < torch.finfo(torch.bfloat16).eps
    for leaf, grad in zip(problem.leaves.values(), grads, strict=True):
        assert relative_error(leaf.grad, grad) < 1e-6


# ---- layouts


@pytest.mark.parametrize("reference_kind", ["live", "cached"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_layouts(packed: bool, reference_kind: str) -> None:
    problem = make_problem([2, 3, 1, 4, 2], packed=packed, reference=reference_kind, bias=True, scores=True)
    assert_exact(problem.to(torch.float64), loss="plackett_luce", robust=KLRobust(lam=0.5), chunk_bytes=1)


def test_padded_and_packed_agree() -> None:
    padded, packed = (make_problem([2, 3, 2], packed=p, bias=True, seed=11).to(torch.float64) for p in (False, True))
    one, one_grads = computed(padded)
    two, two_grads = computed(packed)
    torch.testing.assert_close(one.logps, two.logps)
    torch.testing.assert_close(one.ref_logps, two.ref_logps)
    torch.testing.assert_close(one.loss, two.loss)
    rows = torch.arange(padded.targets.shape[1]) < packed.kwargs["seq_lens"][:, None]
    torch.testing.assert_close(one_grads[0][rows], two_grads[0])
    torch.testing.assert_close(one_grads[1:], two_grads[1:])
    assert not one_grads[0][~rows].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("spots", ["front", "middle", "end", "all over"])
def test_ignored_rows_have_no_part(spots: str, dtype: torch.dtype) -> None:
    problem = make_problem([2, 2]).to(torch.float64)
    total = problem.targets.shape[1]
    problem.targets = torch.randint(0, 37, problem.targets.shape)
    holes = {"front": [0, 1], "middle": [total // 2], "end": [total - 1], "all over": [*range(0, total, 2)]}[spots]
    problem.targets[:, holes] = -100
    with torch.no_grad():
        problem.hidden[:, holes] = math.nan
        problem.kwargs["ref_hidden"][:, holes] = math.inf
    problem.targets = problem.targets.to(dtype)
    _, grads = computed(problem)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, holes].any()
    problem.targets = problem.targets.long()
    with torch.no_grad():
        problem.hidden[:, holes] = 0
        problem.kwargs["ref_hidden"][:, holes] = 0
    assert_exact(problem)


@pytest.mark.parametrize("backend", ["torch", "cpu", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("full", [False, True], ids=["ragged", "every_row_counts"])
@pytest.mark.parametrize(
    "view", ["shifted", "transposed_weight", "sliced_weight", "columns", "batch_stride", "expanded"]
)
def test_strided_inputs(view: str, full: bool, dtype: torch.dtype, backend: str) -> None:
    require_backend(backend)
    problem = make_problem([2, 2, 2], reference="cached").to(dtype)
    if full:
        problem.targets = torch.randint(0, 37, problem.targets.shape)
    (rows, length), width, hidden, weight = problem.targets.shape, 8, problem.hidden, problem.weight
    with torch.no_grad():
        if view == "shifted":
            hidden = torch.cat([hidden, torch.full((rows, 1, width), math.nan, dtype=dtype)], 1)[:, :-1]
        elif view == "transposed_weight":
            weight = weight.t().contiguous().t()
        elif view == "sliced_weight":
            weight = torch.cat([weight, torch.full_like(weight, math.nan)], 1)[:, :width]
        elif view == "columns":
            hidden = hidden.transpose(1, 2).contiguous().transpose(1, 2)
        elif view == "batch_stride":
            hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
        else:
            hidden = hidden[:, :1].expand(rows, length, width)
    strided = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    dense = [tensor.detach().contiguous().clone().requires_grad_() for tensor in (hidden, weight)]
    assert not (strided[0].is_contiguous() and strided[1].is_contiguous())
    results = []
    for leaves in (strided, dense):
        # Small chunks: their starts and ends are where strides go wrong.
        output = linear_preference_loss(*leaves, problem.targets, backend=backend, chunk_bytes=1, **problem.kwargs)
        results.append([output.loss, *torch.autograd.grad(output.loss, leaves)])
    tolerance = 8 * torch.finfo(dtype).eps
    for one, two in zip(*results, strict=True):
        assert relative_error(one, two) < tolerance


def test_single_responses_with_sft() -> None:
    problem = make_problem([1] * 5, reference="none").to(torch.float64)
    output = assert_exact(problem, loss="sft", robust=KLRobust(lam=0.3), chunk_bytes=1)
    del problem.kwargs["group_sizes"]
    same = linear_preference_loss(*problem.args, group_size=1, loss="sft", robust=KLRobust(lam=0.3))
    torch.testing.assert_close(same.loss, output.loss)
    assert output.ref_logps is None
    assert output.log_ratios is None


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo", "plackett_luce"])
def test_an_empty_response_counts_as_probability_one(loss: str) -> None:
    problem = make_problem([2, 2, 2]).to(torch.float64)
    problem.targets[3] = -100
    output = assert_exact(problem, loss=loss, robust=KLRobust(lam=0.5), chunk_bytes=1)
    assert output.logps[3] == 0


@pytest.mark.parametrize("backend", ["torch", "cpu", "auto"])
def test_a_batch_without_a_single_token(backend: str) -> None:
    require_backend(backend)
    problem = make_problem([2, 2], bias=True).to(torch.float32)
    problem.targets[:] = -100
    output, grads = computed(problem, backend=backend)
    assert output.loss.item() == pytest.approx(math.log(2))
    assert not any(grad.any() for grad in grads)
    assert not output.logps.any()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("group", [0, 2])
def test_one_broken_group_makes_the_loss_nan(group: int, value: float, objective: str) -> None:
    problem = make_problem([2, 2, 2], reference="cached").to(torch.float32)
    row = 2 * group
    with torch.no_grad():
        problem.hidden[row, problem.targets[row] != -100] = value
    output, grads = computed(problem, robust=OBJECTIVES[objective], chunk_bytes=1)
    assert output.loss.isnan()
    assert grads[1].isnan().any()
    assert output.group_losses.isnan().tolist() == [g == group for g in range(3)]


def test_vectors_of_the_output() -> None:
    problem = make_problem([2, 4, 3], calibration=True).to(torch.float64)
    output = linear_preference_loss(*problem.args, robust=KLRobust(lam=0.5), **problem.kwargs)
    logits = reference.transformed_logits(problem.hidden, problem.weight)
    ref_logits = reference.transformed_logits(problem.kwargs["ref_hidden"], problem.kwargs["ref_weight"])
    torch.testing.assert_close(output.logps, reference.sequence_logps(logits, problem.targets)[0].detach())
    torch.testing.assert_close(output.ref_logps, reference.sequence_logps(ref_logits, problem.targets)[0].detach())
    torch.testing.assert_close(output.log_ratios, output.logps - output.ref_logps)
    scores = problem.kwargs["calibration"] * output.group_losses / 0.5
    torch.testing.assert_close(output.weights, scores.softmax(0).detach())
    torch.testing.assert_close(output.log_partition, scores.logsumexp(0).detach())
    torch.testing.assert_close(output.ess, 1 / output.weights.square().sum())
    assert output.parameter == 0.5
    assert output.worst_groups(2).tolist() == output.weights.argsort(descending=True)[:2].tolist()
    vectors = [output.logps, output.ref_logps, output.log_ratios, output.group_losses, output.weights, output.ess]
    assert not any(vector.requires_grad for vector in vectors)


# ---- gradients that are needed, and those that are not


@pytest.mark.parametrize(
    "needs", list(itertools.product([False, True], repeat=3)), ids=lambda n: "".join("ny"[x] for x in n)
)
@pytest.mark.parametrize("objective", [Mean(), KLRobust(radius=0.1)], ids=["one_pass", "two_passes"])
def test_every_combination_of_requires_grad(
    needs: tuple[bool, bool, bool], objective: RobustObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem([2, 2], bias=True).to(torch.float64)
    _, wanted = expected(problem, robust=objective)
    asked: list[tuple[bool, ...]] = []
    allocate = LinearHead.allocate

    def spy(self: LinearHead, head: Any, rows: int, *wanted: bool) -> HeadGradients:
        asked.append(wanted)
        return allocate(self, head, rows, *wanted)

    monkeypatch.setattr(LinearHead, "allocate", spy)
    leaves = problem.leaves.values()
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    output = linear_preference_loss(*problem.args, robust=objective, **problem.kwargs)
    assert asked == [needs]
    assert output.loss.requires_grad == any(needs)
    if any(needs):
        output.loss.backward()
    for leaf, need, gradient in zip(leaves, needs, wanted, strict=True):
        if need:
            assert relative_error(leaf.grad, gradient) < 1e-7
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("robust", ["mean", "kl", "kl_radius", "dr_dpo"])
def test_without_grad_there_are_no_gradients(mode: Any, robust: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem([2, 2], bias=True).to(torch.float64)
    live = linear_preference_loss(*problem.args, robust=robust, **problem.kwargs)
    # Nothing is run backward, in any head.
    for head in (GemmHead, *LinearHead.__subclasses__()):
        monkeypatch.setattr(head, "backward", None)
    with mode():
        output = linear_preference_loss(*problem.args, robust=robust, **problem.kwargs)
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, live.loss.detach())
    torch.testing.assert_close(output.weights, live.weights)


def test_only_the_gradients_that_are_asked_for_come_back() -> None:
    problem = make_problem([2, 2], bias=True).to(torch.float64)
    loss = linear_preference_loss(*problem.args, **problem.kwargs).loss
    (only,) = torch.autograd.grad(loss, [problem.hidden])
    assert relative_error(only, expected(problem)[1][0]) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_backward_twice(dtype: torch.dtype) -> None:
    problem = make_problem([2, 2], bias=True).to(dtype)
    leaves = list(problem.leaves.values())
    loss = linear_preference_loss(*problem.args, **problem.kwargs).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for one, copy, two, three in zip(first, kept, second, third, strict=True):
        assert torch.equal(one, copy)
        assert torch.equal(one, three)
        assert relative_error(two, 3 * one) < torch.finfo(dtype).eps
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("factor", [2.0, 0.25, -1.0, 0.0])
def test_scaled_loss(factor: float) -> None:
    problem = make_problem([2, 2], bias=True).to(torch.float32)
    leaves = list(problem.leaves.values())
    plain = computed(problem)[1]
    loss = linear_preference_loss(*problem.args, **problem.kwargs).loss
    for one, two in zip(torch.autograd.grad(factor * loss, leaves), plain, strict=True):
        torch.testing.assert_close(one, factor * two)


def test_second_derivatives_are_refused() -> None:
    problem = make_problem([2, 2]).to(torch.float64)
    loss = linear_preference_loss(*problem.args, **problem.kwargs).loss
    (gradient,) = torch.autograd.grad(loss**2, [problem.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_preference_loss: gradients of gradients are not implemented"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_id)
def test_tied_weight(dtype: torch.dtype) -> None:
    problem = make_problem([2, 2], reference="cached").to(dtype)
    mixing = torch.randn(problem.targets.shape[0], problem.targets.shape[1], 37).to(dtype)

    def gradient(operator: Any, weight: Tensor) -> Tensor:
        hidden = torch.tanh(mixing.to(weight.dtype) @ weight)
        kwargs = problem.kwargs | {"ref_logps": problem.kwargs["ref_logps"].to(weight.dtype)}
        loss = operator(hidden, weight, problem.targets, robust=Mean(), **kwargs)
        loss = loss if isinstance(loss, Tensor) else loss.loss
        return torch.autograd.grad(loss, weight)[0]

    wide = problem.weight.detach().double().requires_grad_()
    truth = gradient(reference.linear_preference_loss, wide)
    plain = gradient(reference.linear_preference_loss, problem.weight)
    ours = gradient(linear_preference_loss, problem.weight)
    assert relative_error(ours, truth) <= 2 * relative_error(plain, truth) + 1e-12


@pytest.mark.parametrize("transform", ["plain", "softcap", "scale", "softcap_scale_bias"])
@pytest.mark.parametrize("objective", ["mean", "kl"])
def test_gradcheck(transform: str, objective: str) -> None:
    problem = make_problem([2, 3], vocab=11, width=4, longest=3, bias="bias" in transform, calibration=True)
    problem = problem.to(torch.float64)
    options: dict[str, Any] = {"robust": OBJECTIVES[objective], "chunk_bytes": 1, "beta": 0.5}
    options |= {"softcap": 3.0} if "softcap" in transform else {}
    options |= {"logit_scale": 0.7} if "scale" in transform else {}
    assert_exact(problem, **options)
    kwargs = {name: value for name, value in problem.kwargs.items() if name != "bias"}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_preference_loss(hidden, weight, problem.targets, bias=bias, **kwargs, **options).loss

    assert torch.autograd.gradcheck(loss, tuple(problem.leaves.values()))


# ---- chunks


@pytest.mark.parametrize("backend", ["torch", "cpu", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_the_chunk_size_does_not_matter(dtype: torch.dtype, backend: str) -> None:
    require_backend(backend)
    # Groups of up to 4 × 24 rows, against chunks of 16 rows: some go in pieces, some in whole groups.
    sizes = [2, 4, 1, 1, 3, 2]
    problem = make_problem(sizes, longest=24, bias=True, calibration=True).to(dtype)
    options: dict[str, Any] = {"loss": "plackett_luce", "robust": KLRobust(lam=0.5), "backend": backend}
    whole, whole_grads = computed(problem, chunk_bytes=1 << 30, **options)
    tolerance = 32 * torch.finfo(dtype).eps
    for chunk_bytes in (1, 37 * 4 * 40):
        output, grads = computed(problem, chunk_bytes=chunk_bytes, **options)
        assert relative_error(output.loss, whole.loss) < tolerance
        for one, two in zip(grads, whole_grads, strict=True):
            assert relative_error(one, two) < tolerance


def test_a_group_larger_than_a_chunk_takes_a_second_look() -> None:
    problem = make_problem([5, 1, 6], longest=40, bias=True).to(torch.float64)
    assert_exact(problem, loss="plackett_luce", robust=KLRobust(lam=0.5), chunk_bytes=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_scores_that_grow_from_chunk_to_chunk(backend: str, dtype: torch.dtype) -> None:
    # Steps within the headroom of the accumulators (25), over it (40), and over everything fp32 can hold (500).
    problem = make_problem([2] * 6, longest=20, bias=True, reference="cached").to(dtype)
    margin = torch.tensor([0.0, 25.0, 45.0, 85.0, 585.0, 600.0], dtype=torch.float64)
    with torch.no_grad():
        logps = linear_preference_loss(*problem.args, **problem.kwargs).logps.double()
        problem.kwargs["ref_logps"] = (logps + torch.stack([margin, -margin], 1).flatten()).to(dtype)
    options: dict[str, Any] = {"beta": 0.5, "robust": KLRobust(lam=1.0)}
    output, grads = computed(problem, backend=backend, chunk_bytes=1, **options)
    assert float(output.group_losses[-1] - output.group_losses[0]) > 500
    assert all(gradient.isfinite().all() for gradient in grads)
    assert_within_budget([problem], options, backend=backend, chunk_bytes=1)


@pytest.mark.parametrize("lam", [1e-3, 1e-30, 1e30], ids="{:g}".format)
def test_extreme_robustness(lam: float) -> None:
    problem = make_problem([2] * 5, bias=True).to(torch.float64)
    output, grads = computed(problem, robust=KLRobust(lam=lam), chunk_bytes=1)
    worst = int(output.group_losses.argmax())
    limit = output.group_losses.mean() if lam > 1 else output.group_losses[worst]
    assert relative_error(output.loss, limit) < (1e-10 if lam > 1 else 0.05)
    if lam < 1e-20:
        assert output.weights[worst] == 1
    assert all(gradient.isfinite().all() for gradient in grads)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_calibration_of_zero_everywhere(objective: str) -> None:
    problem = make_problem([2, 2, 2], bias=True).to(torch.float64)
    problem.kwargs["calibration"] = torch.zeros(3, dtype=torch.float64)
    output, grads = computed(problem, robust=OBJECTIVES[objective], chunk_bytes=1)
    assert output.loss == 0
    assert not any(gradient.any() for gradient in grads)
    torch.testing.assert_close(output.weights, torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_extreme_margins_stay_finite(objective: str, sign: int) -> None:
    problem = make_problem([2, 2, 2], bias=True, reference="cached").to(torch.float32)
    problem.kwargs["ref_logps"] = torch.tensor([0, 3e4, 0.0, 0.0, 1e6, -1e6]) * sign
    output, grads = computed(problem, robust=OBJECTIVES[objective], chunk_bytes=1)
    assert output.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in grads)


# ---- the exactness property: nothing depends on how the batch is cut


def select(problem: Problem, groups: list[int]) -> Problem:
    """A part of a padded problem: whole groups in the given order."""
    sizes = problem.kwargs["group_sizes"]
    ends = sizes.cumsum(0)
    rows = torch.cat([torch.arange(int(ends[g] - sizes[g]), int(ends[g])) for g in groups])

    def part(name: str, value: Any) -> Any:
        if name in ("bias", "ref_weight"):
            return value
        index = torch.tensor(groups) if len(value) == len(sizes) and name != "ref_hidden" else rows
        return value[index]

    kwargs = {name: part(name, value) for name, value in problem.kwargs.items()}
    return Problem(problem.hidden[rows], problem.weight, problem.targets[rows], kwargs)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=7).filter(lambda sizes: sum(sizes) > len(sizes)),
    cuts=st.sets(st.integers(1, 6), min_size=1, max_size=4),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    calibrated=st.booleans(),
    shift=st.floats(-5, 5),
)
def test_parts_add_up_to_the_batch(
    seed: int, sizes: list[int], cuts: set[int], objective: str, calibrated: bool, shift: float
) -> None:
    whole = make_problem(sizes, bias=True, reference="cached", calibration=calibrated, seed=seed).to(torch.float64)
    options: dict[str, Any] = {"loss": "plackett_luce", "beta": 0.5, "robust": OBJECTIVES[objective], "chunk_bytes": 1}
    leaves = list(whole.leaves.values())
    output, wanted = computed(whole, **options)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(sizes)), len(sizes)]
    parts = [select(whole, list(range(*pair))) for pair in itertools.pairwise(bounds)]

    def run(part: Problem, **more: Any) -> robust_dpo.PreferenceOutput:
        return linear_preference_loss(*part.args, **part.kwargs, **options, **more)

    def total(normalizer: Tensor) -> list[Tensor]:
        losses = [run(part, log_normalizer=normalizer).loss for part in parts]
        # One backward for each part, as an accumulation window has it.
        gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses]
        return [torch.stack(column).sum(0) for column in zip(*gradients, strict=True)]

    with torch.no_grad():
        log_z = torch.stack([run(part).log_partition for part in parts]).logsumexp(0)
        weights = torch.cat([run(part, log_normalizer=log_z).weights for part in parts])
    torch.testing.assert_close(log_z, output.log_partition)
    torch.testing.assert_close(weights, output.weights)
    for one, two in zip(total(log_z), wanted, strict=True):
        assert relative_error(one, two) < 1e-9
    constant = torch.tensor(shift, dtype=torch.float64)
    for one, two in zip(total(constant), wanted, strict=True):
        assert relative_error(one * (constant - log_z).exp(), two) < 1e-9


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(5)), objective=st.sampled_from(sorted(OBJECTIVES)))
def test_the_order_of_groups_does_not_matter(seed: int, order: list[int], objective: str) -> None:
    whole = make_problem([2, 1, 3, 2, 4], reference="cached", calibration=True, scores=True, seed=seed)
    options: dict[str, Any] = {"loss": "plackett_luce", "robust": OBJECTIVES[objective], "chunk_bytes": 1}
    whole = whole.to(torch.float64)
    mixed = select(whole, list(order)).to(torch.float64)
    one, one_grads = computed(whole, **options)
    two, two_grads = computed(mixed, **options)
    torch.testing.assert_close(one.loss, two.loss)
    torch.testing.assert_close(one.group_losses[list(order)], two.group_losses)
    torch.testing.assert_close(one.weights[list(order)], two.weights)
    torch.testing.assert_close(one_grads[1], two_grads[1])
    torch.testing.assert_close(
        select(Problem(one_grads[0], *whole.args[1:], whole.kwargs), list(order)).hidden, two_grads[0]
    )


# ---- a loss of the user's own


def margin_loss(groups: Groups, *, beta: float = 0.1, gap: float = 1.0) -> Tensor:
    """Squared hinge of the first log-ratio over the others' mean."""
    ratios = beta * groups.log_ratios
    others = ratios[:, 1:].sum(1) / (groups.mask.sum(1) - 1)
    return torch.relu(gap - ratios[:, 0] + others) ** 2


def test_a_users_loss_goes_through_the_single_pass() -> None:
    problem = make_problem([2, 3, 2], calibration=True).to(torch.float64)
    options: dict[str, Any] = {"loss": margin_loss, "beta": 0.3, "gap": 2.5, "robust": KLRobust(lam=0.5)}
    output = assert_exact(problem, chunk_bytes=1, **options)
    logps = robust_dpo.sequence_logps(*problem.args)
    kwargs = {name: problem.kwargs[name] for name in ("group_sizes", "calibration")}
    apart = robust_dpo.preference_loss(logps, output.ref_logps, **kwargs, **options)
    torch.testing.assert_close(output.loss, apart.loss)
    leaves = list(problem.leaves.values())
    again = linear_preference_loss(*problem.args, **problem.kwargs, **options).loss
    torch.testing.assert_close(torch.autograd.grad(again, leaves), torch.autograd.grad(apart.loss, leaves))


def constant_loss(groups: Groups) -> Tensor:
    return torch.ones(groups.logps.shape[0])


class ParameterLoss(torch.nn.Module):
    """Has a graph, but none that leads to the log-probs."""

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.nn.Parameter(torch.ones(()))

    def forward(self, groups: Groups) -> Tensor:
        return self.level.expand(groups.logps.shape[0])


@pytest.mark.parametrize("robust", ["mean", "kl", "kl_radius"])
def test_a_loss_that_ignores_its_input_has_no_gradient(robust: str) -> None:
    problem = make_problem([2, 2], bias=True).to(torch.float64)
    output, grads = computed(problem, loss=constant_loss, robust=robust)
    assert output.loss == 1
    assert output.group_losses.dtype == torch.float64
    assert not any(gradient.any() for gradient in grads)


def test_a_loss_with_parameters_to_train_is_refused() -> None:
    problem = make_problem([2, 2]).to(torch.float64)
    with pytest.raises(ValueError, match=r"loss: expected a loss without trainable parameters; .* got ParameterLoss"):
        linear_preference_loss(*problem.args, loss=ParameterLoss(), **problem.kwargs)
    frozen = ParameterLoss().requires_grad_(False)
    assert linear_preference_loss(*problem.args, loss=frozen, **problem.kwargs).loss == 1


def test_a_call_leaves_no_objective_behind() -> None:
    problem = make_problem([2, 2]).to(torch.float64)
    before = len(objective._NAMED)
    linear_preference_loss(*problem.args, loss=lambda groups: groups.log_ratios[:, 0], **problem.kwargs)
    with pytest.raises(ValueError, match="loss"):
        linear_preference_loss(*problem.args, loss=lambda groups: groups.logps, **problem.kwargs)
    assert len(objective._NAMED) == before


def test_large_scores_keep_the_gradient_normalised() -> None:
    """Scores hℓ/λ near 1e5 have an ulp of 1e-2 in fp32; the factor e^{shift − log Z} of the gradient must hide it."""
    problem = make_problem([2] * 6, reference="cached").to(torch.float32)
    options = {"loss": "ipo", "beta": 0.01, "robust": KLRobust(lam=0.02)}
    output, grads = computed(problem, chunk_bytes=1, **options)
    assert output.log_partition > 5e4
    logps = robust_dpo.sequence_logps(*problem.args)
    lengths = (problem.targets != -100).sum(1)
    other = robust_dpo.preference_loss(logps, lengths=lengths, **problem.kwargs, **options)
    torch.testing.assert_close(other.group_losses, output.group_losses, rtol=2**-22, atol=0)
    for gradient, wanted in zip(grads, torch.autograd.grad(other.loss, list(problem.leaves.values())), strict=True):
        assert relative_error(gradient, wanted) < 1e-5


def test_a_loss_of_the_wrong_shape_is_refused() -> None:
    problem = make_problem([2, 2, 2]).to(torch.float64)
    with pytest.raises(ValueError, match=r"loss: expected shape \[3\], one value per group.*got \[3, 2\]"):
        linear_preference_loss(*problem.args, loss=lambda groups: groups.logps, **problem.kwargs)
    with pytest.raises(TypeError, match="loss: expected a floating tensor"):
        linear_preference_loss(*problem.args, loss=lambda groups: 1.0, **problem.kwargs)
