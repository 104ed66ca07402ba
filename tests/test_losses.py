"""Losses against formulas written out in float64, their gradients, and how they are named and refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robust_dpo.groups import GroupLayout, Groups
from robust_dpo.losses import available_losses, pairwise_loss, register_loss, registry, resolve
from robust_dpo.losses.pairs import Pair

OF_ONE_GROUP = ("cdpo", "ipo", "lire", "plackett_luce", "robust", "rrhf", "sft", "sigmoid", "simpo")
# The formulas of the last two, which sort the whole batch, are in tests/test_transport.py.
NAMES = (*OF_ONE_GROUP, "aot", "aot_unpaired")
PAIRWISE = ("cdpo", "ipo", "robust", "sigmoid", "simpo")


def make_groups(
    sizes: list[int],
    *,
    scores: bool = True,
    dtype: torch.dtype = torch.float64,
    scale: float = 20.0,
    ties: bool = False,
) -> Groups:
    """Fresh random groups of the given sizes; `ties` rounds the scores so that some are equal."""
    total = sum(sizes)
    layout = GroupLayout.build(total, 0, torch.tensor(sizes), torch.device("cpu"))
    quality = torch.randn(total, dtype=dtype)
    return Groups(
        logps=layout.pad(-scale * torch.rand(total, dtype=dtype)),
        lengths=layout.pad(torch.randint(1, 40, (total,)).to(dtype), 1.0),
        mask=layout.mask,
        ref_logps=layout.pad(-scale * torch.rand(total, dtype=dtype)),
        scores=layout.pad(quality.round() if ties else quality) if scores else None,
    )


SHAPES = {
    "pairs": [2, 2, 2],
    "one-pair": [2],
    "triples": [3, 3],
    "quadruples": [4, 4, 4],
    "single-responses": [1, 1],
    "ragged": [1, 4, 2, 3, 1],
}


# The literal side: one group at a time, Python floats, no masks, no stable forms.


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pair_loss(name: str, w: dict[str, float], r: dict[str, float]) -> float:
    u = 0.1 * ((w["S"] - w["R"]) - (r["S"] - r["R"]))
    if name == "sigmoid":
        return -math.log(sigma(u))
    if name == "cdpo":
        return -0.9 * math.log(sigma(u)) - 0.1 * math.log(sigma(-u))
    if name == "robust":
        return (-0.9 * math.log(sigma(u)) + 0.1 * math.log(sigma(-u))) / 0.8
    if name == "ipo":
        return ((w["S"] - w["R"]) / w["n"] - (r["S"] - r["R"]) / r["n"] - 5.0) ** 2
    return -math.log(sigma(2.0 * (w["S"] / w["n"] - r["S"] / r["n"]) - 0.5))


def literal_group(name: str, group: list[dict[str, float]]) -> float:
    best_first = sorted(group, key=lambda y: -y["q"])  # stable, as the loss
    size = len(group)
    better = [(w, r) for w in group for r in group if w["q"] > r["q"]]
    if name in PAIRWISE:
        return sum(pair_loss(name, w, r) for w, r in better) / len(better) if better else 0.0
    if name == "sft":
        return -best_first[0]["S"] / best_first[0]["n"]
    if name == "rrhf":
        return sum(max(0.0, r["S"] / r["n"] - w["S"] / w["n"]) for w, r in better) / size
    if name == "plackett_luce":
        e = [math.exp(0.1 * (y["S"] - y["R"])) for y in best_first]
        return -sum(math.log(e[k] / sum(e[k:])) for k in range(size)) / size
    policy, reward = [math.exp(y["S"] / 2) for y in group], [math.exp(y["q"]) for y in group]
    return -sum(p / sum(policy) * v / sum(reward) for p, v in zip(policy, reward, strict=True)) / size


def literal(name: str, groups: Groups) -> Tensor:
    assert groups.ref_logps is not None
    columns = {"S": groups.logps, "R": groups.ref_logps, "n": groups.lengths, "q": groups.quality}
    return torch.tensor(
        [
            literal_group(name, [{k: float(v[g, i]) for k, v in columns.items()} for i in range(int(mask.sum()))])
            for g, mask in enumerate(groups.mask)
        ],
        dtype=torch.float64,
    )


def test_every_loss_of_this_file_is_registered():
    assert set(NAMES) <= set(available_losses())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "ranking"),
    [(n, r) for n in OF_ONE_GROUP for r in ("scores", "ties", "position") if (n, r) != ("lire", "position")],
)
def test_matches_the_formula(name: str, ranking: str, shape: str):
    groups = make_groups(SHAPES[shape], scores=ranking != "position", ties=ranking == "ties")
    loss = resolve(name)
    expected = literal(name, groups)
    torch.testing.assert_close(loss(groups), expected, rtol=1e-12, atol=1e-12)
    assert groups.ref_logps is not None
    single = Groups(
        groups.logps.float(),
        groups.lengths.float(),
        groups.mask,
        groups.ref_logps.float(),
        None if groups.scores is None else groups.scores.float(),
    )
    torch.testing.assert_close(loss(single), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, shape: str):
    groups = make_groups(SHAPES[shape], ties=True)
    loss = resolve(name)
    logps = groups.logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(replace(groups, logps=x)), (logps,))


OPTIONS = {
    "cdpo": {"label_smoothing": 0.5},
    "robust": {"label_smoothing": 0.49},
    "ipo": {"length_normalize": False},
    "rrhf": {"length_penalty": 0.5, "sft_weight": 2.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize("options", ["defaults", "options"])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_margins_stay_finite(name: str, options: str, margin: float, dtype: torch.dtype):
    groups = make_groups([1, 2, 4, 3], dtype=dtype)
    logps = torch.where(groups.quality > 0, margin, -margin).masked_fill(~groups.mask, 0.0).to(dtype).requires_grad_()
    losses = resolve(name, options=OPTIONS.get(name) if options == "options" else None)(replace(groups, logps=logps))
    assert losses.isfinite().all() and losses.dtype == dtype
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    assert gradient.isfinite().all()
    assert (gradient[~groups.mask] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_functorch_sees_the_same_gradient(name: str):
    groups = make_groups([3, 1, 4])
    loss = resolve(name)
    logps = groups.logps.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(replace(groups, logps=logps)).sum(), logps)
    losses, pullback = torch.func.vjp(lambda x: loss(replace(groups, logps=x)), groups.logps)
    torch.testing.assert_close(pullback(torch.ones_like(losses))[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name: str):
    torch.compiler.reset()
    groups, loss = make_groups([3, 2, 3]), resolve(name)

    def run(logps: Tensor) -> Tensor:
        return loss(replace(groups, logps=logps)).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(groups.logps), run(groups.logps))


@given(data=st.data(), name=st.sampled_from(NAMES))
def test_groups_are_independent_of_order_and_padding(data: st.DataObject, name: str):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    groups = make_groups(sizes, ties=data.draw(st.booleans()))
    order = torch.tensor(data.draw(st.permutations(range(len(sizes)))))
    extra = data.draw(st.integers(0, 3))
    loss = resolve(name)

    def rearranged(values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values[order], (0, extra), value=fill)

    assert groups.ref_logps is not None and groups.scores is not None
    other = Groups(
        rearranged(groups.logps, 0.0),
        rearranged(groups.lengths, 1.0),
        rearranged(groups.mask, False),
        rearranged(groups.ref_logps, 0.0),
        rearranged(groups.scores, 0.0),
    )
    torch.testing.assert_close(loss(other), loss(groups)[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRWISE)
def test_scores_decide_the_winner_of_a_pair(name: str):
    groups = make_groups([2, 2], scores=False)
    swapped = replace(groups, scores=torch.tensor([[0.0, 1.0]] * 2, dtype=torch.float64))
    assert groups.ref_logps is not None
    flipped = Groups(groups.logps.flip(1), groups.lengths.flip(1), groups.mask, groups.ref_logps.flip(1))
    torch.testing.assert_close(resolve(name)(swapped), resolve(name)(flipped))


def test_plackett_luce_of_a_pair_is_half_of_sigmoid():
    groups = make_groups([2] * 5)
    torch.testing.assert_close(2 * resolve("plackett_luce")(groups), resolve("sigmoid")(groups))


def test_options_change_the_formula():
    groups = make_groups([2] * 4, scores=False)
    d = groups.log_ratios
    sums = resolve("ipo", 0.5, {"length_normalize": False})(groups)
    torch.testing.assert_close(sums, (d[:, 0] - d[:, 1] - 1.0) ** 2)
    hinge = (groups.logps[:, 1] - groups.logps[:, 0]).relu() / 2
    nll = -groups.logps[:, 0] / groups.lengths[:, 0]
    both = resolve("rrhf", options={"length_penalty": 0.0, "sft_weight": 3.0})(groups)
    torch.testing.assert_close(both, hinge + 3 * nll)


# Names, options and refusals.


def test_beta_none_is_the_losses_own_default():
    assert resolve("simpo").key == "simpo(beta=2.0,gamma_beta_ratio=0.25)"
    assert resolve("sigmoid", 0.3).key == "sigmoid(beta=0.3)"
    assert resolve("lire", 0.3).key == "lire(temperature=2.0)"
    assert hash(resolve("sigmoid")) == hash(resolve("sigmoid", 0.1))
    assert resolve("sigmoid").needs_reference and not resolve("simpo").needs_reference
    assert resolve("lire").needs_scores and not resolve("rrhf").needs_scores


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "unknown-name": (lambda: resolve("dpo"), ValueError, r"loss: expected one of .*sigmoid.*, got 'dpo'"),
    "not-callable": (lambda: resolve(3), TypeError, r"loss: expected a name or a function .*, got int"),
    "unknown-option": (
        lambda: resolve("cdpo", options={"epsilon": 0.1}),
        TypeError,
        r"options of loss 'cdpo': expected one of label_smoothing, got epsilon",
    ),
    "option-of-a-loss-without": (
        lambda: resolve("plackett_luce", options={"T": 1}),
        TypeError,
        r"options of loss 'plackett_luce': expected none, got T",
    ),
    "zero-beta": (lambda: resolve("sigmoid", 0.0), ValueError, r"beta: expected a number in \(0, inf\), got 0.0"),
    "nan-beta": (lambda: resolve("rrhf", math.nan), ValueError, r"beta: expected .*, got nan"),
    "infinite-beta": (lambda: resolve("ipo", math.inf), ValueError, r"beta: expected .*, got inf"),
    "text-beta": (lambda: resolve("ipo", "0.1"), TypeError, r"beta: expected a number .*, got str"),
    "smoothing-of-a-half": (
        lambda: resolve("robust", options={"label_smoothing": 0.5}),
        ValueError,
        r"label_smoothing: expected a number in \[0, 0.5\), got 0.5",
    ),
    "negative-smoothing": (
        lambda: resolve("cdpo", options={"label_smoothing": -0.1}),
        ValueError,
        r"label_smoothing: expected a number in \[0, 0.5\], got -0.1",
    ),
    "zero-temperature": (
        lambda: resolve("lire", options={"temperature": 0}),
        ValueError,
        r"temperature: expected a number in \(0, inf\), got 0",
    ),
    "flag-as-number": (
        lambda: resolve("ipo", options={"length_normalize": 1}),
        TypeError,
        r"length_normalize: expected True or False, got int",
    ),
    "bool-as-number": (
        lambda: resolve("simpo", options={"gamma_beta_ratio": True}),
        TypeError,
        r"gamma_beta_ratio: expected .*, got bool",
    ),
    "no-reference": (
        lambda: resolve("sigmoid")(replace(make_groups([2]), ref_logps=None)),
        ValueError,
        r"ref_logps: expected a reference, which the loss 'sigmoid' needs, got None",
    ),
    "no-scores": (
        lambda: resolve("lire")(make_groups([2], scores=False)),
        ValueError,
        r"scores: expected scores .*'lire' needs, got None",
    ),
    "taken-name": (lambda: register_loss("sigmoid"), ValueError, r"name: expected a name that is not registered yet"),
    "option-without-default": (
        lambda: register_loss("test_bare")(lambda groups, *, beta: groups.logps.sum(1)),
        TypeError,
        r"loss 'test_bare': expected a default for every option, got none for beta",
    ),
    "wrong-shape": (
        lambda: resolve(lambda groups: groups.logps)(make_groups([2, 2])),
        ValueError,
        r"loss: expected shape \[2\], one value per group, .* got \[2, 2\]",
    ),
    "integer-result": (
        lambda: resolve(lambda groups: groups.mask.sum(1))(make_groups([2])),
        TypeError,
        r"loss: expected a floating tensor .*, got torch.int64",
    ),
    "no-tensor": (lambda: resolve(lambda groups: 0.5)(make_groups([2])), TypeError, r"loss: expected .*, got float"),
    "unread-signature": (lambda: resolve(torch.sum), TypeError, r"loss: expected a function whose signature"),
    "missing-option": (
        lambda: resolve(lambda groups, margin: groups.logps.sum(1) - margin),
        TypeError,
        r"loss: expected a value for every option .*, got none for margin",
    ),
    "options-of-a-bound-loss": (
        lambda: resolve(resolve("sigmoid"), 0.2),
        ValueError,
        r"loss: expected no beta or options .*, got sigmoid\(beta=0.1\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message(case: str):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_user_functions_get_beta_only_where_they_take_it():
    groups = make_groups([2, 2], scores=False)

    def hinge(groups: Groups, beta: float = 1.0, slack: float = 0.0) -> Tensor:
        return (1 - beta * (groups.log_ratios[:, 0] - groups.log_ratios[:, 1]) + slack).relu()

    def plain(groups: Groups) -> Tensor:
        return -groups.mean_logps[:, 0]

    torch.testing.assert_close(resolve(hinge, 0.5, {"slack": 1.0})(groups), hinge(groups, 0.5, 1.0))
    torch.testing.assert_close(resolve(plain, 0.5)(groups), resolve("sft")(groups))
    with pytest.raises(TypeError, match=r"expected one of slack, got margin"):
        resolve(hinge, options={"margin": 1.0})
    assert resolve(hinge).key != resolve(plain).key


def test_a_module_is_a_loss():
    class Offset(torch.nn.Module):
        def forward(self, groups: Groups, shift: float = 1.0) -> Tensor:
            return groups.logps.sum(1) + shift

    groups = make_groups([2, 2])
    torch.testing.assert_close(resolve(Offset(), 0.1, {"shift": 2.0})(groups), groups.logps.sum(1) + 2)


def test_a_pairwise_function_of_the_user_is_lifted():
    @pairwise_loss
    def squared(pair: Pair, *, beta: float = 0.1) -> Tensor:
        return (beta * pair.margin - 1) ** 2

    groups = make_groups([3, 1, 4])
    both = resolve("ipo", 0.1, {"length_normalize": False})(groups)
    torch.testing.assert_close(resolve(squared, 0.2)(groups), 0.04 * both)


def test_the_example_of_the_documentation_runs(monkeypatch: pytest.MonkeyPatch):
    text = (Path(__file__).resolve().parents[1] / "docs" / "objectives.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "register_loss" in code]
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    exec(example, {})
    groups = make_groups([2, 2], scores=False)
    d = groups.log_ratios
    torch.testing.assert_close(resolve("hinge_example", 0.3)(groups), (1 - 0.3 * (d[:, 0] - d[:, 1])).relu())


def test_the_documentation_names_every_loss():
    text = (Path(__file__).resolve().parents[1] / "docs" / "objectives.md").read_text()
    assert [name for name in NAMES if f"| `{name}` |" not in text] == []
