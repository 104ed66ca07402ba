"""The load-balancing loss of routers: against transformers, against its formula in float64, and in parts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from robust_dpo.expert_load import ExpertLoad, RouterPass, load_balancing_loss, load_slopes

GROUPS = 5


def _pass(
    seed: int = 0, *, layers: int = 3, places: int = 29, experts: int = 7, top_k: int = 2, scale: float = 1.0
) -> RouterPass:
    """Random logits in float64 over places of which every group has some, with 0 to 3 tokens in each."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(layers, places, experts, generator=generator, dtype=torch.float64)
    more = places - GROUPS - 1
    owners = torch.cat([torch.arange(GROUPS), torch.randint(GROUPS, (1 + more,), generator=generator)])
    weights = torch.cat([torch.ones(GROUPS), torch.zeros(1), torch.randint(4, (more,), generator=generator)]).long()
    return RouterPass(tuple(each.requires_grad_() for each in logits.unbind()), owners, weights, GROUPS, top_k)


def _where(routers: RouterPass, at: Tensor | slice) -> RouterPass:
    """The same routers at some of the places."""
    logits = tuple(each[at] for each in routers.logits)
    return replace(routers, logits=logits, owners=routers.owners[at], weights=routers.weights[at])


def _by_the_formula(routers: RouterPass) -> Tensor:
    """E Σ_k Σ_e f_ke P_e, token by token: a place is repeated for every token in it."""
    logits, top_k = torch.stack(routers.logits), routers.top_k
    probabilities = logits.softmax(-1).repeat_interleave(routers.weights, dim=1).flatten(0, 1)
    choices = torch.nn.functional.one_hot(probabilities.topk(top_k).indices, logits.shape[-1]).double()
    return logits.shape[-1] * (choices.mean(0) * probabilities.mean(0)).sum()


@pytest.mark.parametrize("top_k", [1, 2, 7])
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0], ids=["ties", "usual", "huge"])
def test_value_and_gradient_are_those_of_transformers(top_k: int, scale: float) -> None:
    routers = _pass(top_k=top_k, scale=scale)
    # Its mask is a weight, too.
    theirs = load_balancing_loss_func(routers.logits, 7, top_k, routers.weights[None])
    formula = _by_the_formula(routers)
    load = routers.load().total()
    ours = routers.weighted(load_slopes(load))
    # transformers adds up in float32.
    assert float(load_balancing_loss(load)) == pytest.approx(float(theirs.detach()), rel=1e-5)
    torch.testing.assert_close(load_balancing_loss(load), formula.detach())
    torch.testing.assert_close(ours, formula)
    expected = torch.autograd.grad(formula, routers.logits, retain_graph=True)
    in_float32 = torch.autograd.grad(theirs, routers.logits)
    for mine, exact, rounded in zip(torch.autograd.grad(ours, routers.logits), expected, in_float32, strict=True):
        torch.testing.assert_close(mine, exact)
        torch.testing.assert_close(mine, rounded, rtol=1e-5, atol=1e-7)


def test_an_even_load_is_the_least() -> None:
    """Every expert chosen as often, with the same probability: aux is top_k."""
    experts, top_k = 4, 2
    logits = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    even = RouterPass((logits,), torch.tensor([0, 0]), torch.tensor([1, 1]), 1, top_k).load().total()
    assert even.chosen.tolist() == [1.0] * experts
    assert float(load_balancing_loss(even)) == pytest.approx(top_k)
    one_sided = RouterPass((logits[:1] * 50,), torch.tensor([0]), torch.tensor([1]), 1, top_k).load().total()
    assert float(load_balancing_loss(one_sided)) == pytest.approx(experts)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), parts=st.integers(1, 6))
def test_parts_add_up_to_the_whole(seed: int, parts: int) -> None:
    """Places cut anywhere, as micro-batches and ranks do: loads, values and gradients add up."""
    whole = _pass(seed)
    owner_of = torch.tensor(random.Random(seed).choices(range(parts), k=29))
    cut = [_where(whole, owner_of == part) for part in range(parts)]
    load = whole.load()
    table = sum(each.load().to_tensor() for each in cut)
    torch.testing.assert_close(ExpertLoad.of_tensor(table).to_tensor(), load.to_tensor())
    slopes = load_slopes(ExpertLoad.of_tensor(table).total())
    aux = _by_the_formula(whole)
    together = sum(each.weighted(slopes) for each in cut)
    torch.testing.assert_close(together, aux)
    expected = torch.autograd.grad(aux, whole.logits)
    for mine, theirs in zip(torch.autograd.grad(together, whole.logits), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_losses_of_parts_by_themselves_do_not_add_up() -> None:
    """What the two passes are for."""
    whole = _pass()
    parts = [_where(whole, at) for at in (slice(0, 10), slice(10, 29))]
    shares = [float(each.load().tokens.sum() / whole.load().tokens.sum()) for each in parts]
    mean = sum(
        share * float(load_balancing_loss(each.load().total())) for share, each in zip(shares, parts, strict=True)
    )
    assert abs(mean - float(load_balancing_loss(whole.load().total()))) > 1e-2


def test_loads_of_groups() -> None:
    routers = _pass()
    load = routers.load()
    assert load.chosen.shape == load.probability.shape == (GROUPS, 7)
    sizes = torch.bincount(routers.owners, routers.weights.double(), minlength=GROUPS)
    assert bool((sizes != torch.bincount(routers.owners, minlength=GROUPS)).any()), "weights matter"
    assert load.tokens.tolist() == (3 * sizes).tolist()
    torch.testing.assert_close(load.chosen.sum(1), 2 * load.tokens)
    torch.testing.assert_close(load.probability.sum(1), load.tokens)
    for index in range(GROUPS):
        mine = _where(routers, routers.owners == index)
        alone = replace(mine, owners=torch.zeros_like(mine.owners), groups=1)
        torch.testing.assert_close(alone.load().to_tensor()[0], load.to_tensor()[index])


def test_what_stands_where_no_token_is_has_no_part() -> None:
    routers = _pass()
    empty = routers.weights == 0
    assert bool(empty.any())
    slopes = load_slopes(routers.load().total())
    logits = tuple(each.masked_fill(empty[:, None], float("nan")) for each in routers.logits)
    poisoned = replace(routers, logits=logits)
    assert torch.equal(poisoned.load().to_tensor(), routers.load().to_tensor())
    assert torch.equal(poisoned.weighted(slopes), routers.weighted(slopes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_exactly(dtype: torch.dtype) -> None:
    routers = _pass(places=4000)
    half = replace(routers, logits=tuple(each.detach().to(dtype) for each in routers.logits))
    exact = replace(routers, logits=tuple(each.double() for each in half.logits))
    assert torch.equal(half.load().chosen, exact.load().chosen)
    torch.testing.assert_close(half.load().probability, exact.load().probability, rtol=1e-6, atol=0)
    slopes = load_slopes(exact.load().total())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(half.weighted(slopes)) == pytest.approx(float(exact.weighted(slopes)), rel=1e-6)
