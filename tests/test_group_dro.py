"""Group DRO: the recursion of the paper written out, the operators, hostile numbers, and a state that goes on."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import make_problem, relative_error
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

import robust_dpo
from robust_dpo import preference_loss, reference, robust
from robust_dpo.robust import GroupDRO, KLRobust, Mean, RobustObjective

NAMES = ["law", "maths", "poems"]

numbers = st.floats(-30, 30, width=32)
domains = st.integers(0, len(NAMES) - 1)
batches = st.lists(st.tuples(numbers, st.floats(0, 8, width=32), domains), min_size=1, max_size=12)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def by_hand(q: list[float], batch: list[tuple[float, float, int]], step_size: float) -> tuple[list[float], float]:
    """The weights and the objective after one step of the paper's algorithm, with Python's numbers."""
    means = []
    for domain in range(len(q)):
        mine = [h * loss for loss, h, label in batch if label == domain]
        means.append(math.fsum(mine) / len(mine) if mine else 0.0)
    top = max(step_size * mean for mean in means)
    raised = [weight * math.exp(step_size * mean - top) for weight, mean in zip(q, means, strict=True)]
    q = [weight / math.fsum(raised) for weight in raised]
    return q, math.fsum(weight * mean for weight, mean in zip(q, means, strict=True))


def columns(batch: list[tuple[float, float, int]]) -> tuple[Tensor, Tensor, Tensor]:
    losses, calibration, labels = zip(*batch, strict=True)
    return tensor([*losses]), tensor([*calibration]), torch.tensor(labels)


@given(steps=st.lists(batches, min_size=1, max_size=5), step_size=st.floats(0, 0.5))
def test_steps_are_those_of_the_paper(steps: list[list[tuple[float, float, int]]], step_size: float) -> None:
    objective, q = GroupDRO(NAMES, step_size), [1 / 3] * 3
    for batch in steps:
        losses, calibration, labels = columns(batch)
        q, value = by_hand(q, batch, step_size)
        close(objective.at(labels).solve(losses, calibration).value, value)
        objective.advance(losses, calibration, labels)
        close(objective.weights, tensor(q))
    held = objective.at(labels, training=False).solve(losses, calibration)
    # A domain that is not there has no part in the mean of those that are.
    there = math.fsum(q[domain] for domain in {*labels.tolist()})
    assume(there > 1e-100)
    close(held.value, by_hand(q, batch, 0.0)[1] / there, 1e-8)
    close(objective.weights, tensor(q))


@pytest.mark.parametrize("gap", [1.0, 5000.0], ids=["plain", "weights-of-zero"])
def test_evaluation_of_some_domains_is_a_mean_of_their_losses(gap: float) -> None:
    """Also where their weights are too small for a number that is not a logarithm."""
    objective = GroupDRO(NAMES, 1.0)
    objective.advance(tensor([0.0, gap, math.log(3)]), None, torch.arange(3))
    losses, h = tensor([2.0, 4.0, 10.0]), tensor([1.0, 0.5, 2.0])
    solution = objective.at(torch.tensor([0, 0, 2]), training=False).solve(losses, h)
    close(solution.value, 0.25 * 2 + 0.75 * 20)
    close(solution.coefficients, tensor([0.125, 0.0625, 1.5]))
    close(solution.weights, tensor([0.125, 0.125, 0.75]))
    for domain in range(3):
        alone = objective.at(torch.tensor([domain] * 3), training=False).solve(losses, h)
        close(alone.value, (losses * h).mean())


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("labels", [[0], [1, 1, 0, 2, 0], [2, 0, 2, 2], [1] * 9], ids=str)
def test_matches_autograd_of_the_specification(labels: list[int], calibrated: bool) -> None:
    objective, every = GroupDRO(NAMES, 0.3), torch.arange(3)
    objective.advance(torch.randn(3), None, every)
    losses = torch.randn(len(labels), dtype=torch.float64, requires_grad=True)
    h = 0.1 + torch.rand(len(labels), dtype=torch.float64) if calibrated else None
    batch = objective.at(torch.tensor(labels))
    value = reference.aggregate(batch, losses, torch.ones_like(losses) if h is None else h)
    solution = batch.solve(losses, h)
    close(solution.value, value.detach())
    close(solution.coefficients, torch.autograd.grad(value, losses)[0])
    close(solution.weights.sum(), 1.0)
    assert 1 - 1e-9 <= float(solution.ess) <= len(labels) + 1e-9


def test_weights_are_shares_of_the_domains_where_all_are_there() -> None:
    objective = GroupDRO(NAMES, 0.1)
    labels, losses = torch.tensor([0, 1, 1, 2, 2, 2, 2]), torch.rand(7, dtype=torch.float64)
    solution = objective.at(labels).solve(losses)
    objective.advance(losses, None, labels)
    close(solution.weights, objective.weights[labels] / tensor([1, 2, 2, 4, 4, 4, 4]))
    close(solution.weights, solution.coefficients)


@given(batch=batches, data=st.data())
def test_order_of_the_groups_does_not_matter(batch: list[tuple[float, float, int]], data: st.DataObject) -> None:
    losses, h, labels = columns(batch)
    order = torch.tensor(data.draw(st.permutations(range(len(batch)))))
    one, other = GroupDRO(NAMES, 0.2), GroupDRO(NAMES, 0.2)
    first, second = one.at(labels).solve(losses, h), other.at(labels[order]).solve(losses[order], h[order])
    close(second.value, first.value)
    close(second.coefficients, first.coefficients[order])
    one.advance(losses, h, labels)
    other.advance(losses[order], h[order], labels[order])
    close(other.weights, one.weights)


def test_one_domain_is_the_mean_for_ever() -> None:
    objective, labels = GroupDRO(["all"], 5.0), torch.zeros(6, dtype=torch.int64)
    for _ in range(3):
        losses, h = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
        ours, mean = objective.at(labels).solve(losses, h), Mean().solve(losses, h)
        close(ours.value, mean.value)
        close(ours.weights, mean.weights)
        close(ours.coefficients, mean.coefficients)
        objective.advance(losses, h, labels)
        close(objective.weights, tensor([1.0]))


def test_steps_approach_the_worst_domain() -> None:
    objective, labels = GroupDRO(NAMES, 0.1), torch.arange(3)
    for _ in range(300):
        objective.advance(tensor([0.5, 1.5, 1.0]), None, labels)
    close(objective.weights, tensor([0.0, 1.0, 0.0]), 1e-5)


# Hostile numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_steps_end_at_the_worst_domain_and_come_back(dtype: torch.dtype) -> None:
    objective, labels = GroupDRO(NAMES, 1e300), torch.arange(3)
    for worst in (1, 0, 2):
        losses = torch.zeros(3, dtype=dtype)
        losses[worst] = 1e30
        solution = objective.at(labels).solve(losses)
        assert solution.value.isfinite() and solution.coefficients.isfinite().all()
        for _ in range(5):
            objective.advance(losses, None, labels)
        close(objective.weights.sum(), 1.0)
        assert objective.weights.argmax() == worst


def test_no_weight_is_too_small_to_grow_again() -> None:
    objective, labels = GroupDRO(["a", "b"], 1.0), torch.arange(2)
    objective.advance(tensor([0.0, 5000.0]), None, labels)
    assert float(objective.weights[0]) == 0.0
    objective.advance(tensor([5000.0, 0.0]), None, labels)
    close(objective.weights, tensor([0.5, 0.5]))


@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("calibrated", [False, True], ids=["losses", "calibration"])
def test_what_is_not_finite_stays_so_and_moves_nothing(hostile: float, calibrated: bool) -> None:
    objective, labels = GroupDRO(NAMES, 0.5), torch.tensor([0, 1, 1, 2])
    objective.advance(torch.rand(4), None, labels)
    before = objective.weights.clone()
    spoilt, fine = tensor([1.0, hostile, 2.0, 0.5]), tensor([1.0, 2.0, 3.0, 4.0])
    losses, h = (fine, spoilt) if calibrated else (spoilt, None)
    solution = objective.at(labels).solve(losses, h)
    assert not (solution.value.isfinite() and solution.coefficients.isfinite().all())
    objective.advance(losses, h, labels)
    assert torch.equal(objective.weights, before)
    objective.advance(fine, None, labels)
    assert objective.weights.isfinite().all() and not torch.equal(objective.weights, before)


@pytest.mark.parametrize("taken", [False, torch.tensor(False)], ids=["flag", "tensor"])
def test_a_step_that_was_not_taken_moves_nothing(taken: bool | Tensor) -> None:
    objective, labels = GroupDRO(NAMES, 0.5), torch.arange(3)
    before = objective.weights.clone()
    objective.advance(torch.rand(3), None, labels, taken=taken)
    assert torch.equal(objective.weights, before)
    objective.advance(torch.rand(3), None, labels, taken=torch.tensor(True))
    assert not torch.equal(objective.weights, before)


def test_solving_leaves_the_state_as_it_is_and_a_batch_keeps_its_weights() -> None:
    objective, labels, losses = GroupDRO(NAMES, 0.5), torch.arange(3), torch.rand(3)
    batch = objective.at(labels)
    value = batch.solve(losses).value
    close(objective.weights, tensor([1 / 3] * 3))
    objective.advance(losses, None, labels)
    assert torch.equal(batch.solve(losses).value, value)
    assert not torch.equal(objective.at(labels).solve(losses).value, value)


def test_nothing_is_read_from_the_device() -> None:
    """Tensors without contents cannot give up a number: whatever reads one fails."""
    objective, losses = GroupDRO(NAMES, 0.5), torch.rand(4, device="meta")
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    objective.advance(losses, losses, labels, taken=torch.tensor(True, device="meta"))
    assert objective.at(labels).solve(losses, losses).coefficients.device.type == "meta"
    assert {value.device.type for value in objective.metrics().values()} == {"meta"}


# The state


def test_state_goes_on_as_if_it_had_not_stopped() -> None:
    whole, first, second = (GroupDRO(NAMES, 0.2) for _ in range(3))
    steps = [(torch.randn(5), torch.randint(3, (5,))) for _ in range(8)]
    for losses, labels in steps:
        whole.advance(losses, None, labels)
    for losses, labels in steps[:3]:
        first.advance(losses, None, labels)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    first.advance(steps[4][0], None, steps[4][1])  # what was saved does not change with it
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for losses, labels in steps[3:]:
        second.advance(losses, None, labels)
    assert torch.equal(second.weights, whole.weights)
    assert isinstance(second, Stateful)


@pytest.mark.parametrize("names", [["law", "maths"], ["law", "poems", "maths"], ["law", "maths", "prose"]], ids=str)
def test_state_of_other_domains_is_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"state: expected that of the domains \['law', 'maths', 'poems'\], got"):
        GroupDRO(NAMES).load_state_dict(GroupDRO(names).state_dict())


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
def test_losses_of_the_domains_that_are_there(calibrated: bool) -> None:
    objective, labels = GroupDRO(NAMES, 1.0), torch.tensor([2, 0, 2])
    losses, h = tensor([-3.0, -4.0, -5.0]), tensor([1.0, 2.0, 0.0])
    found = objective.domain_losses(losses, h if calibrated else None, labels)
    law, poems = (-8.0, -1.5) if calibrated else (-4.0, -4.0)
    expected = {"domain_loss/law": law, "domain_loss/poems": poems, "worst_domain_loss": max(law, poems)}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
    assert Mean().domain_losses(losses, h, labels) == {}


def test_metrics_name_the_domains() -> None:
    objective = GroupDRO(["a", "b"], math.log(3))
    objective.advance(tensor([0.0, 1.0]), None, torch.arange(2))
    metrics = {name: float(value) for name, value in objective.metrics().items()}
    assert metrics == pytest.approx({"domain_weight/a": 0.25, "domain_weight/b": 0.75})


# What a trainer asks of every objective


def test_domains_come_from_the_data_unless_they_are_given() -> None:
    named = robust.resolve("group_dro")
    assert named.needs_domains and not named.single_pass
    of_data = named.for_domains(["b", "a"])
    assert of_data.labels_of(["a", "b", "a"]).tolist() == [1, 0, 1]
    given = GroupDRO(["a", "b", "c"])
    assert given.for_domains(["b"]) is given
    with pytest.raises(ValueError, match=r"domains: expected names among 'a', 'b', 'c', got 'd', 'e'"):
        given.for_domains(["e", "a", "d"])


@pytest.mark.parametrize("objective", [Mean(), KLRobust(radius=0.1)], ids=lambda each: each.key)
def test_domains_are_nothing_to_other_objectives(objective: RobustObjective) -> None:
    labels = objective.labels_of(["a", "b"])
    objective.advance(torch.rand(2), None, labels)
    assert labels.tolist() == [0, 0] and not objective.needs_domains and objective.metrics() == {}
    assert objective.for_domains(["a"]) is objective is objective.at(labels) is objective.at(labels, training=False)


# The operators


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [2, 4, 3, 2]], ids=["K2", "ragged"])
@pytest.mark.parametrize("loss", ["sigmoid", "plackett_luce", "simpo"])
def test_operators_match_float64_autograd(loss: str, sizes: list[int], calibrated: bool) -> None:
    objective = GroupDRO(NAMES, 0.7)
    objective.advance(torch.randn(3), None, torch.arange(3))
    batch = objective.at(torch.tensor([2, 0, 2, 0]))
    problem = make_problem(sizes, bias=True).to(torch.float64)
    problem.kwargs["calibration"] = torch.rand(4, dtype=torch.float64) if calibrated else None
    expected = reference.linear_preference_loss(*problem.args, loss=loss, robust=batch, **problem.kwargs)
    leaves = [*problem.leaves.values()]
    expected_grads = torch.autograd.grad(expected, leaves, materialize_grads=True)
    output = robust_dpo.linear_preference_loss(*problem.args, loss=loss, robust=batch, chunk_bytes=1, **problem.kwargs)
    close(output.loss.detach(), expected.detach(), 1e-11)
    for name, grad, expected_grad in zip(
        problem.leaves, torch.autograd.grad(output.loss, leaves), expected_grads, strict=True
    ):
        assert relative_error(grad, expected_grad) < 1e-10, name


def test_preference_loss_matches_the_linear_one() -> None:
    objective = GroupDRO(NAMES, 0.7)
    batch = objective.at(torch.tensor([2, 0, 1, 0]))
    problem = make_problem([2, 2, 2, 2]).to(torch.float64)
    whole = robust_dpo.linear_preference_loss(*problem.args, robust=batch, **problem.kwargs)
    logps = whole.logps.clone().requires_grad_()
    output = preference_loss(logps, whole.ref_logps, robust=batch)
    close(output.loss.detach(), whole.loss.detach(), 1e-12)
    close(output.weights, whole.weights)
    live = -torch.nn.functional.logsigmoid(0.1 * (logps - whole.ref_logps).view(4, 2) @ tensor([1.0, -1.0]))
    expected = reference.aggregate(batch, live, torch.ones(4, dtype=torch.float64))
    close(torch.autograd.grad(output.loss, logps)[0], torch.autograd.grad(expected, logps)[0], 1e-11)


def test_batches_have_names_of_their_own() -> None:
    objective, labels = GroupDRO(NAMES), torch.arange(3)
    assert objective.at(labels).key != objective.at(labels).key
    assert len({objective, GroupDRO(NAMES)}) == 2  # hashable, and no other is the same: each has a state


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "one-string": (lambda: GroupDRO("law"), TypeError, "domains: expected a sequence of names, got str"),
    "number": (lambda: GroupDRO(["a", 3]), TypeError, "domains: expected names that are strings, got int"),
    "twice": (lambda: GroupDRO(["a", "a"]), ValueError, r"domains: expected every name once, got \['a', 'a'\]"),
    "negative-step": (lambda: GroupDRO(step_size=-1), ValueError, r"step_size: expected a number in \[0, inf\), got"),
    "infinite-step": (lambda: GroupDRO(step_size=math.inf), ValueError, "step_size: expected a number"),
    "no-batch": (lambda: GroupDRO(["a"]).solve(torch.zeros(1)), ValueError, r"robust: expected .*\.at\(labels\)"),
    "no-domains": (lambda: GroupDRO().at(torch.zeros(1).long()), ValueError, "domains: expected the names of the data"),
    "floating-labels": (lambda: GroupDRO(["a"]).at(torch.zeros(1)), TypeError, "labels: expected an int64 tensor"),
    "matrix": (lambda: GroupDRO(["a"]).at(torch.zeros(1, 1).long()), ValueError, r"labels: expected shape \[G\]"),
    "too-large": (lambda: GroupDRO(["a"]).at(torch.ones(1).long()), ValueError, "labels: expected numbers from 0 to 0"),
    "negative": (lambda: GroupDRO(["a"]).at(-torch.ones(1).long()), ValueError, "labels: expected numbers from 0 to 0"),
    "too-few": (
        lambda: GroupDRO(["a"]).at(torch.zeros(2).long()).solve(torch.zeros(3)),
        ValueError,
        r"labels: expected shape \[3\], one per group, got \[2\]",
    ),
    "empty": (
        lambda: GroupDRO(["a"]).at(torch.zeros(0).long()).solve(torch.zeros(0)),
        ValueError,
        "losses: expected at least one group",
    ),
    "part": (
        lambda: GroupDRO(["a"]).at(torch.zeros(1).long()).solve(torch.zeros(1), None, 0.0),
        ValueError,
        "log_normalizer: expected None: GroupDRO",
    ),
    "unknown": (lambda: GroupDRO(["a"]).labels_of(["b"]), ValueError, "domains: expected names among 'a', got 'b'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
