"""Log-probs and gradients of whole models through packed rows, against the padded layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_primitives import TorchVarlenAttention
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations import flex_attention as flex_integration

from robust_dpo.layout import Group, LayoutPlan, LayoutUnsupportedError, flash, pack_groups
from robust_dpo.layout.dense import SDPA
from robust_dpo.layout.flash import FLASH
from robust_dpo.layout.flex import FLEX
from robust_dpo.layout.segments import SEGMENTS

FAMILIES = ["llama", "qwen2", "qwen2-window", "qwen3", "mistral-window", "gemma2", "gpt2-learned-positions"]
BACKENDS = {backend.name: backend for backend in (SEGMENTS, SDPA, FLASH)}


@pytest.fixture(params=list(BACKENDS))
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LayoutPlan:
    """A plan for each backend with a backward pass here; flash-attn's kernels are replaced by plain PyTorch."""
    monkeypatch.setattr(flash, "FlashVarlenAttention", TorchVarlenAttention)
    return LayoutPlan("group", BACKENDS[request.param])


def gradients(model: Any, logps: Tensor, coefficients: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logps * coefficients).sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts.values()])


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).detach().norm())


@pytest.mark.parametrize("size", [2, 4], ids=["pairs", "lists-of-4"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_as_exact_as_the_padded_layout(
    family: str,
    size: int,
    dtype: torch.dtype,
    plan: LayoutPlan,
    build_model: Callable[..., Any],
    draw_groups: Callable[..., list[Group]],
    exact_token_logps: Callable[..., Tensor],
    padded_token_logps: Callable[..., Tensor],
    packed_token_logps: Callable[..., Tensor],
    in_float64: Callable[[Any], Any],
) -> None:
    model = build_model(family).to(dtype)
    groups = draw_groups(3, size)
    # Rows of 100 tokens: some groups share one, and what is left of a row is padding.
    packed = pack_groups(groups, row_tokens=100)
    coefficients = torch.randn(len(packed.targets), dtype=torch.float64)

    exact_model = in_float64(model)
    exact = exact_token_logps(exact_model, groups)
    exact_gradients = gradients(exact_model, exact, coefficients)
    padded = padded_token_logps(model, groups)
    padded_gradients = gradients(model, padded, coefficients)
    ours = packed_token_logps(model, packed, plan)
    our_gradients = gradients(model, ours, coefficients)

    eps = torch.finfo(dtype).eps
    assert error(ours, exact) <= 2 * error(padded, exact) + eps * float(exact.detach().norm())
    assert our_gradients.keys() == exact_gradients.keys()
    # The error of one small tensor is left to chance, so the budget counts that of the whole gradient as well.
    whole, all_exact = (flat(each) for each in (padded_gradients, exact_gradients))
    relative = error(whole, all_exact) / float(all_exact.norm())
    for name, expected in exact_gradients.items():
        share = relative * float(expected.norm()) + 0.1 * eps * float(all_exact.norm())
        assert error(our_gradients[name], expected) <= 2 * (error(padded_gradients[name], expected) + share), name


@pytest.mark.parametrize("family", [*FAMILIES, "llama4-chunks"])
def test_exact_in_float64(
    family: str,
    plan: LayoutPlan,
    build_model: Callable[..., Any],
    draw_groups: Callable[..., list[Group]],
    exact_token_logps: Callable[..., Tensor],
    packed_token_logps: Callable[..., Tensor],
) -> None:
    model = build_model(family).double()
    groups = draw_groups(5, 3)
    if (family, plan.attention) == ("llama4-chunks", FLASH):
        with pytest.raises(LayoutUnsupportedError, match="its mask is neither causal nor a sliding window"):
            packed_token_logps(model, pack_groups([Group([1] * 20, [[2, 3]])]), plan)
        return
    for shared in (True, False):
        ours = packed_token_logps(model, pack_groups(groups, shared=shared), plan)
        # Norms and rotations of some families are in float32 whatever the weights are.
        torch.testing.assert_close(ours, exact_token_logps(model, groups), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_forward(
    family: str,
    build_model: Callable[..., Any],
    draw_groups: Callable[..., list[Group]],
    padded_token_logps: Callable[..., Tensor],
    packed_token_logps: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without compilation, which takes half a minute, and without a backward pass, which the CPU does not have."""

    def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: Any) -> Any:
        return flex_attention(query, key, value, **options)

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", uncompiled)
    model = build_model(family)
    groups = draw_groups(4, 3)
    with torch.no_grad():
        ours = packed_token_logps(model, pack_groups(groups, row_tokens=150), LayoutPlan("group", FLEX))
        torch.testing.assert_close(ours, padded_token_logps(model, groups), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_flex_attention_compiled(
    build_model: Callable[..., Any],
    draw_groups: Callable[..., list[Group]],
    padded_token_logps: Callable[..., Tensor],
    packed_token_logps: Callable[..., Tensor],
) -> None:
    model = build_model("llama", hidden_size=64, head_dim=16)
    groups = draw_groups(4, 3)
    with torch.no_grad():
        ours = packed_token_logps(model, pack_groups(groups), LayoutPlan("group", FLEX))
        torch.testing.assert_close(ours, padded_token_logps(model, groups), rtol=1e-4, atol=1e-4)


TOKENS = st.integers(0, 96)
GROUPS = st.lists(
    st.builds(
        Group,
        st.lists(TOKENS, min_size=1, max_size=12),
        st.lists(st.lists(TOKENS, min_size=1, max_size=8), min_size=1, max_size=4),
        st.none(),
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2"])
def test_a_group_does_not_see_who_shares_its_row(
    family: str, build_model: Callable[..., Any], packed_token_logps: Callable[..., Tensor]
) -> None:
    model = build_model(family).double().eval()
    plans = [LayoutPlan("group", backend) for backend in (SEGMENTS, SDPA)]

    @settings(max_examples=25)
    @given(groups=GROUPS, row_tokens=st.none() | st.integers(1, 60), backend=st.sampled_from([0, 1]))
    def check(groups: list[Group], row_tokens: int | None, backend: int) -> None:
        with torch.no_grad():
            together = packed_token_logps(model, pack_groups(groups, row_tokens=row_tokens), plans[backend])
            alone = [packed_token_logps(model, pack_groups([group]), plans[backend]) for group in groups]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)

    check()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradient_checkpointing_recomputes_the_same(
    family: str,
    reentrant: bool,
    plan: LayoutPlan,
    build_model: Callable[..., Any],
    draw_groups: Callable[..., list[Group]],
    packed_token_logps: Callable[..., Tensor],
) -> None:
    packed = pack_groups(draw_groups())
    coefficients = torch.randn(len(packed.targets), dtype=torch.float64)
    plain, checkpointed = build_model(family), build_model(family)
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    functions = [layer._gradient_checkpointing_func for layer in checkpointed.model.layers]
    expected = gradients(plain, packed_token_logps(plain, packed, plan), coefficients)
    ours = gradients(checkpointed, packed_token_logps(checkpointed, packed, plan), coefficients)
    assert [layer._gradient_checkpointing_func for layer in checkpointed.model.layers] == functions
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6)


def test_attention_dropout_falls_to_the_masked_path(
    build_model: Callable[..., Any], draw_groups: Callable[..., list[Group]], packed_token_logps: Callable[..., Tensor]
) -> None:
    model = build_model("llama", attention_dropout=0.5)
    packed = pack_groups(draw_groups(6))
    plan = LayoutPlan("group", SEGMENTS)
    first, second = (packed_token_logps(model, packed, plan) for _ in range(2))
    assert not torch.allclose(first, second)
    model.eval()
    assert torch.equal(packed_token_logps(model, packed, plan), packed_token_logps(model, packed, plan))
