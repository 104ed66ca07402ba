"""The losses that sort the whole batch, against sorting by hand and TRL; operators under losses that couple groups."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Problem, make_problem, relative_error, require_backend
from torch import Tensor

from robust_dpo import Groups, linear_preference_loss, losses, preference_loss, reference
from robust_dpo.groups import GroupLayout
from robust_dpo.losses import registry, resolve
from robust_dpo.ops import epilogue
from robust_dpo.robust import CVaR, DrDPO, KLRobust, Mean, RobustObjective

NAMES = ("aot", "aot_unpaired")
AGGREGATIONS: dict[str, RobustObjective] = {
    "mean": Mean(),
    "kl": KLRobust(lam=0.3),
    "kl_radius": KLRobust(radius=0.2),
    "dr_dpo": DrDPO(beta=0.4),
    "cvar": CVaR(0.5),
}
SHAPES = {
    "pairs": [2] * 7,
    "one-pair": [2],
    "triples": [3, 3, 3],
    "singles": [1, 1],
    "ragged": [1, 4, 2, 3, 1, 2],
}
pytestmark = pytest.mark.usefixtures("one_thread")


def make_groups(sizes: list[int], *, ranking: str = "scores", dtype: torch.dtype = torch.float64) -> Groups:
    """Fresh random groups; their order is that of scores, of scores with ties, or of positions."""
    total = sum(sizes)
    layout = GroupLayout.build(total, 0, torch.tensor(sizes), torch.device("cpu"))
    quality = torch.randn(total, dtype=dtype)
    scores = {"scores": quality, "ties": quality.round(), "position": None}[ranking]
    return Groups(
        logps=layout.pad(-40 * torch.rand(total, dtype=dtype)),
        lengths=layout.pad(torch.randint(1, 40, (total,)).to(dtype), 1.0),
        mask=layout.mask,
        ref_logps=layout.pad(-40 * torch.rand(total, dtype=dtype)),
        scores=None if scores is None else layout.pad(scores),
    )


def by_hand(name: str, groups: Groups, beta: float = 0.1, smoothing: float = 0.0) -> Tensor:
    """[G] the same pair by pair, on lists that Python sorts; differentiable."""
    assert groups.ref_logps is not None
    of_group: list[list[Tensor]] = [[] for _ in groups.mask]
    owners, first, second = [], [], []
    for g, mask in enumerate(groups.mask):
        present = [i for i, there in enumerate(mask.tolist()) if there]
        for w, r in [(w, r) for w in present for r in present if groups.quality[g, w] > groups.quality[g, r]]:
            owners.append(g)
            policy, ref = groups.logps[g], groups.ref_logps[g]
            first.append(policy[w] - policy[r] if name == "aot" else policy[w] - ref[w])
            second.append(ref[w] - ref[r] if name == "aot" else policy[r] - ref[r])
    places = sorted(range(len(first)), key=lambda i: first[i].detach().item())
    for place, other in zip(places, sorted(second, key=lambda value: value.detach().item()), strict=True):
        u = beta * (first[place] - other)
        of_group[owners[place]].append((1 - smoothing) * (-u).exp().log1p() + smoothing * u.exp().log1p())
    zero = 0 * groups.logps.sum()
    return torch.stack([torch.stack(each).mean() if each else zero for each in of_group])


@pytest.mark.parametrize("options", [(None, {}), (0.35, {"label_smoothing": 0.2}), (0.02, {"label_smoothing": 0.5})])
@pytest.mark.parametrize("ranking", ["scores", "ties", "position"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_sorting_by_hand(
    name: str, shape: str, ranking: str, options: tuple[float | None, dict[str, float]]
) -> None:
    groups = make_groups(SHAPES[shape], ranking=ranking)
    coefficients = torch.rand(len(groups.mask), dtype=torch.float64)
    logps = groups.logps.clone().requires_grad_()
    live = replace(groups, logps=logps)
    beta, more = options
    value, truth = resolve(name, beta, more)(live), by_hand(name, live, beta or 0.1, *more.values())
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-13)
    one, two = (torch.autograd.grad((coefficients * each).sum(), logps)[0] for each in (value, truth))
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, shape: str) -> None:
    groups = make_groups(SHAPES[shape], ranking="ties")
    loss = resolve(name, 0.5, {"label_smoothing": 0.1})
    logps = groups.logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(replace(groups, logps=x)), (logps,))


class TheirModel:
    """Stands for a model of TRL: gives the log-probs of tokens that it was made with."""

    def __init__(self, log_probs: Tensor) -> None:
        zeros = torch.zeros_like(log_probs)
        self.output = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def __call__(self, **_: object) -> Any:
        return self.output


def trl_loss(name: str, logps: Tensor, ref_logps: Tensor, beta: float, smoothing: float) -> Tensor:
    """[] what TRL's trainer makes of log-probs [2n] of responses, all chosen ones first."""
    trl = pytest.importorskip("trl", reason="TRL is not installed, so there is nothing to compare with")
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=logps.device, gather=torch.clone, gather_for_metrics=torch.clone),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    ids = torch.zeros(len(logps), 2, dtype=torch.int64)
    ref_chosen, ref_rejected = ref_logps.chunk(2)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids + 1,
        "completion_mask": ids + 1,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss: Tensor = trl.DPOTrainer._compute_loss(trainer, TheirModel(logps[:, None]), inputs, return_outputs=False)
    return loss


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_pairs_is_the_loss_of_trl(name: str, smoothing: float) -> None:
    logps, ref_logps = (-40 * torch.rand(9, 2, dtype=torch.float64) for _ in range(2))
    logps.requires_grad_()
    theirs = trl_loss(name, logps.T.flatten(), ref_logps.T.flatten(), 0.2, smoothing)
    ours = preference_loss(logps.flatten(), ref_logps.flatten(), loss=name, beta=0.2, label_smoothing=smoothing).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logps), torch.autograd.grad(theirs, logps))


@given(data=st.data(), name=st.sampled_from(NAMES))
def test_groups_may_be_in_any_order(data: st.DataObject, name: str) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    order = torch.tensor(data.draw(st.permutations(range(len(sizes)))))
    groups, loss = make_groups(sizes), resolve(name)
    assert groups.ref_logps is not None and groups.scores is not None
    columns = (groups.logps, groups.lengths, groups.mask, groups.ref_logps, groups.scores)
    mixed = Groups(*(column[order] for column in columns))
    torch.testing.assert_close(loss(mixed), loss(groups)[order], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_of_pairs_that_tie_the_first_has_the_lower_rank(name: str) -> None:
    logps = torch.zeros(300, 2, dtype=torch.float64)
    reference_margins = torch.randn(300, dtype=torch.float64)
    ref_logps = torch.stack([torch.zeros_like(reference_margins), -reference_margins], 1)
    output = preference_loss(logps.flatten(), ref_logps.flatten(), loss=name, beta=1.0)
    # All S are 0: δ of rank i is minus the i-th smallest margin, and of the unpaired form minus the i-th smallest d_l.
    expected = torch.nn.functional.softplus(reference_margins.sort().values)
    torch.testing.assert_close(output.group_losses, expected)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_shows_in_its_own_group(name: str, value: float, side: str) -> None:
    groups = make_groups([2, 3, 1, 2, 2], ranking="position")
    logps = groups.logps.clone()
    logps[3, ["chosen", "rejected"].index(side)] = value
    broken = resolve(name)(replace(groups, logps=logps))
    others = torch.tensor([0, 1, 2, 4])
    assert broken[others].isfinite().all()
    # The rest is a batch without the group.
    assert groups.ref_logps is not None
    columns = (groups.logps, groups.lengths, groups.mask, groups.ref_logps)
    torch.testing.assert_close(broken[others], resolve(name)(Groups(*(column[others] for column in columns))))
    assert not broken[3].isfinite()


# ---- the operators


def expected(problem: Problem, **options: Any) -> tuple[Tensor, list[Tensor]]:
    loss = reference.linear_preference_loss(*problem.args, **problem.kwargs, **options)
    return loss.detach(), list(torch.autograd.grad(loss, list(problem.leaves.values()), materialize_grads=True))


def computed(problem: Problem, **options: Any) -> tuple[Tensor, list[Tensor]]:
    loss = linear_preference_loss(*problem.args, **problem.kwargs, **options).loss
    return loss.detach(), list(torch.autograd.grad(loss, list(problem.leaves.values())))


def spread(groups: Groups, *, beta: float = 0.5) -> Tensor:
    """A user's own: how far the reward of a group's first response is from the mean over the batch."""
    rewards = beta * groups.log_ratios[:, 0]
    return (rewards - rewards.mean()) ** 2


spread.couples_groups = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", [*NAMES, spread], ids=[*NAMES, "users"])
def test_the_head_matches_float64_autograd(loss: Any, aggregation: str, packed: bool) -> None:
    problem = make_problem([2, 3, 2, 1, 4, 2], packed=packed, bias=True, scores=True, calibration=True)
    problem = problem.to(torch.float64)
    options = {"loss": loss, "beta": 0.5, "robust": AGGREGATIONS[aggregation]}
    value, gradients = computed(problem, chunk_bytes=1, **options)
    truth, wanted = expected(problem, **options)
    tolerance = 1e-6 if aggregation == "kl_radius" else 1e-10
    assert relative_error(value, truth) < tolerance
    for gradient, true in zip(gradients, wanted, strict=True):
        assert relative_error(gradient, true) < tolerance


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", [*NAMES, spread], ids=[*NAMES, "users"])
def test_log_probs_match_float64_autograd(loss: Any, aggregation: str) -> None:
    sizes = torch.tensor([2, 3, 2, 1, 4])
    logps, ref_logps, scores = (torch.randn(12, dtype=torch.float64) for _ in range(3))
    calibration = torch.rand(5, dtype=torch.float64)
    layout = GroupLayout.build(12, 0, sizes, logps.device)
    logps.requires_grad_()
    robust, bound = AGGREGATIONS[aggregation], resolve(loss, 0.5)
    values = reference.group_epilogue(logps, ref_logps, torch.ones(12), layout, bound, scores)
    truth = reference.aggregate(robust, values, calibration)
    options: dict[str, Any] = {"scores": scores, "calibration": calibration, "group_sizes": sizes, "robust": robust}
    value = preference_loss(logps, ref_logps, loss=bound, **options).loss
    assert relative_error(value, truth) < 1e-6
    one, two = (torch.autograd.grad(each, logps)[0] for each in (value, truth))
    assert relative_error(one, two) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_and_chunk_size(name: str, dtype: torch.dtype, backend: str) -> None:
    require_backend(backend)
    problem = make_problem([2, 4, 1, 3, 2, 2], longest=24, bias=True, calibration=True).to(dtype)
    options = {"loss": name, "robust": KLRobust(lam=0.3)}
    truth, wanted = expected(problem.to(torch.float64), **options)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for chunk_bytes in (1, 37 * 4 * 40, 1 << 30):
        value, gradients = computed(problem, backend=backend, chunk_bytes=chunk_bytes, **options)
        assert relative_error(value, truth) < tolerance
        for gradient, true in zip(gradients, wanted, strict=True):
            assert relative_error(gradient, true) < tolerance


def test_a_kernel_is_not_asked_even_if_it_says_that_it_has_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*_: object) -> None:
        raise AssertionError("a kernel sees one chunk of groups")

    monkeypatch.setattr(epilogue, "get_group_epilogue", lambda *_: kernel)
    problem = make_problem([2, 2, 2], reference="cached").to(torch.float32)
    assert computed(problem, loss="aot")[0].isfinite()
    with pytest.raises(AssertionError, match="a kernel sees one chunk"):
        computed(problem, loss="sigmoid")


def test_what_couples_groups_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    coupled = {name for name in losses.available_losses() if resolve(name).couples_groups}
    assert coupled == set(NAMES)
    assert resolve(spread).couples_groups
    assert not resolve(lambda groups: groups.logps.sum(1)).couples_groups
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    losses.register_loss("test_spread", couples_groups=True)(spread)
    assert resolve("test_spread", 2.0).couples_groups
    assert resolve("aot").key == "aot(beta=0.1,label_smoothing=0.0)"


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_the_values_are_the_same(name: str) -> None:
    problem = make_problem([2, 3, 2], calibration=True).to(torch.float64)
    options: dict[str, Any] = {"loss": name, "robust": "kl", **problem.kwargs}
    live = linear_preference_loss(*problem.args, **options)
    with torch.no_grad():
        still = linear_preference_loss(*problem.args, **options)
    torch.testing.assert_close(still.group_losses, live.group_losses)
    torch.testing.assert_close(still.loss, live.loss.detach())
