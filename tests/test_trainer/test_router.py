"""Mixtures of experts: which models have an auxiliary loss, and what scoring hands back of their routers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from robust_dpo.data import PreferenceCollator
from robust_dpo.expert_load import RouterPass, load_balancing_loss, load_slopes
from robust_dpo.layout import plan_layout
from robust_dpo.trainer.head_route import HeadRoute
from robust_dpo.trainer.router import RouterLoss, padded_places, plan_router_loss
from robust_dpo.trainer.scoring import SequenceScorer
from robust_dpo.trainer.self_check import HeadCheck, check_head

_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NARROW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# name: configuration, its fields, and the layout that "auto" takes.
EXPERTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixtral": ("MixtralConfig", _LOCAL, "group"),
    "qwen2-shared-expert": ("Qwen2MoeConfig", {**_NARROW, "shared_expert_intermediate_size": 24}, "group"),
    "qwen3": ("Qwen3MoeConfig", {**_NARROW, "head_dim": 8}, "group"),
    "qwen3-dense-layer": ("Qwen3MoeConfig", {**_NARROW, "head_dim": 8, "mlp_only_layers": [0]}, "group"),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}, "group"),
    "phimoe": ("PhimoeConfig", {**_LOCAL, "sliding_window": None}, "group"),
    "gpt-oss": ("GptOssConfig", {**_LOCAL, "head_dim": 8, "rope_parameters": _ROPE}, "padded"),
}
MIXED = (2, 3, 1)


def build(family: str, seed: int = 0, **fields: Any) -> Any:
    name, shape, _ = EXPERTS[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**{**_SHAPE, **shape, "output_router_logits": True, **fields})
    # The grouped products of the default take no float64.
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")


@pytest.fixture(params=list(EXPERTS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _rows(generator: torch.Generator, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Tokenised groups of so many responses, of one token and more."""

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 97, (count,), generator=generator).tolist()

    return [
        {
            "id": str(index),
            "prompt_ids": tokens(3 + index),
            "response_ids": [tokens(1 + index + 2 * each) for each in range(size)],
        }
        for index, size in enumerate(sizes)
    ]


def _scored(
    model: Any, layout: str, sizes: tuple[int, ...] = MIXED, *, fused: bool = True, row_tokens: int | None = None
) -> tuple[SequenceScorer, dict[str, Any], Tensor, RouterPass]:
    """The scorer, a batch of `_rows`, their log-probs and their routers."""
    check = check_head(model)
    if not fused:
        check = HeadCheck(None, check.transform, "not wanted")
    plan = plan_layout(model, layout, row_tokens=row_tokens)
    assert plan.kind == layout, plan.reason
    scorer = SequenceScorer(HeadRoute(lambda _: check), layout=plan, router=plan_router_loss(model, None, trial=True))
    batch = PreferenceCollator(0).for_layout(plan)(_rows(torch.Generator().manual_seed(1), sizes))
    routers: list[RouterPass] = []
    logps = scorer.logps(model, batch, routers)
    (one,) = routers
    return scorer, batch, logps, one


def test_the_families_train_in_the_fastest_way(family: str) -> None:
    model = build(family)
    assert plan_layout(model).kind == EXPERTS[family][2]
    assert check_head(model).head is model.get_output_embeddings()
    assert plan_router_loss(model, None, trial=True) == RouterLoss(model.router_aux_loss_coef, 2)
    assert plan_router_loss(model.bfloat16(), 0.5, trial=True) == RouterLoss(0.5, 2)


def test_padded_batches_have_the_aux_loss_of_the_model(family: str) -> None:
    """Where it is told to leave out the last token of each response; and its gradient, from our slopes."""
    model = build(family).double().train()
    scorer, batch, _, _ = _scored(model, "padded")
    seen: list[RouterPass] = []
    # Phi's routers draw experts in training: both passes are to draw the same.
    torch.manual_seed(0)
    scorer.logps(model, batch, seen)
    (routers,) = seen
    counted = _followed(batch["attention_mask"])
    torch.manual_seed(0)
    # What no token sees may be hidden.
    output = model(input_ids=batch["input_ids"], attention_mask=counted, use_cache=False)
    load = routers.load().total()
    layers = sum(1 for _ in output.router_logits)
    assert float(load.tokens) == layers * int(counted.sum())
    torch.testing.assert_close(load_balancing_loss(load).float(), output.aux_loss.detach(), rtol=1e-5, atol=0)
    slopes = load_slopes(load)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = (
        torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
        for value in (routers.weighted(slopes), output.aux_loss)
    )
    assert [each is None for each in ours] == [each is None for each in theirs]
    reached = [(mine, other) for mine, other in zip(ours, theirs, strict=True) if mine is not None]
    assert len(reached) > 3
    for mine, other in reached:
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sizes", [(2, 2, 2), MIXED], ids=["pairs", "mixed"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2-shared-expert"])
@pytest.mark.parametrize("layout", ["group", "packed"])
@pytest.mark.parametrize(("fused", "row_tokens"), [(True, None), (False, 24)], ids=["one-row", "logits-rows-with-gaps"])
def test_every_layout_has_the_same_aux_loss(
    layout: str, family: str, sizes: tuple[int, ...], fused: bool, row_tokens: int | None
) -> None:
    """Loads of each group, value, and its gradient in all weights."""
    model = build(family).double()
    _, _, logps, packed = _scored(model, layout, sizes, fused=fused, row_tokens=row_tokens)
    _, _, expected, padded = _scored(model, "padded", sizes, fused=fused)
    torch.testing.assert_close(logps, expected)
    loads = [routers.load() for routers in (packed, padded)]
    torch.testing.assert_close(loads[0].to_tensor(), loads[1].to_tensor())
    values, gradients = [], []
    parameters = [*model.parameters()]
    for routers, load in zip((packed, padded), loads, strict=True):
        values.append(routers.weighted(load_slopes(load.total())))
        gradients.append(torch.autograd.grad(values[-1], parameters, allow_unused=True))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], load_balancing_loss(loads[0].total()), check_dtype=False)
    assert sum(bool(gradient is not None and gradient.any()) for gradient in gradients[0]) > 3
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            # The model takes rotations, norms and softmaxes in float32.
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("layout", ["group", "packed", "padded"])
def test_a_prompt_counts_for_each_response_and_the_last_token_never(layout: str) -> None:
    routers = _scored(build("mixtral"), layout)[-1]
    rows = _rows(torch.Generator().manual_seed(1), MIXED)
    for row, tokens in zip(rows, routers.load().tokens.tolist(), strict=True):
        assert tokens == 2 * sum(len(row["prompt_ids"]) + len(response) - 1 for response in row["response_ids"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_the_last_token_is_found_wherever_padding_is(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]])
    places = padded_places(mask.to(dtype), torch.tensor([1, 3]))
    assert places.owners.tolist() == [[0] * 4, [1] * 4, [1] * 4, [1] * 4]
    assert places.weights.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]]


def _followed(mask: Tensor) -> Tensor:
    """[S, T] int64, whether another token follows, of padding on the right."""
    return torch.nn.functional.pad(mask[:, 1:], (0, 1))


@pytest.mark.parametrize("layout", ["group", "padded"])
def test_checkpointed_layers_give_the_same_gradient(layout: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = build("mixtral").double().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        _, _, _, routers = _scored(model, layout)
        routers.weighted(torch.arange(4.0)).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients[0])
    for plain, again in zip(*gradients, strict=True):
        assert (plain is None) == (again is None)
        if plain is not None:
            torch.testing.assert_close(plain, again)


def test_adapters_are_looked_through() -> None:
    plain = build("qwen3")
    adapted = get_peft_model(copy.deepcopy(plain), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    expected = _scored(plain, "group")[-1].load().to_tensor()
    routers = _scored(adapted, "group")[-1]
    torch.testing.assert_close(routers.load().to_tensor(), expected)
    routers.weighted(torch.arange(4.0)).backward()
    reached = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert reached
    assert all("lora" in name for name in reached)


def test_virtual_tokens_of_an_adapter_are_not_counted() -> None:
    virtual = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(build("mixtral"), virtual)
    _, batch, _, routers = _scored(model, "padded")
    assert float(routers.load().total().tokens) == 2 * int(_followed(batch["attention_mask"]).sum())


def test_a_copy_that_is_not_trained_has_no_routers() -> None:
    model = build("mixtral")
    scorer, batch, logps, _ = _scored(model, "group")
    seen: list[RouterPass] = []
    torch.testing.assert_close(scorer.for_copy(model).logps(model, batch, seen), logps)
    assert seen == []


def test_when_the_loss_is_on(build_model: Callable[..., Any]) -> None:
    silent = build("mixtral", output_router_logits=False)
    assert plan_router_loss(silent, None, trial=True) is None
    assert plan_router_loss(silent, 0.02, trial=True) == RouterLoss(0.02, 2)
    assert plan_router_loss(build("mixtral", router_aux_loss_coef=0.0), None, trial=True) is None
    assert plan_router_loss(build("mixtral"), 0.0, trial=True) is None
    dense = build_model("llama")
    assert plan_router_loss(dense, None, trial=True) is None
    assert plan_router_loss(dense, 0.0, trial=True) is None
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected 0 or None for LlamaForCausalLM, which has no"):
        plan_router_loss(dense, 0.01, trial=True)


def test_a_loss_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    model.num_experts_per_tok = 3  # not what its routers do
    assert plan_router_loss(model, None, trial=False) == RouterLoss(model.router_aux_loss_coef, 3)
    forward = model.forward

    def doubled(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.aux_loss = 2 * output.aux_loss
        return output

    monkeypatch.setattr(model, "forward", doubled)
    with pytest.raises(ValueError, match="expected 0 for MixtralForCausalLM: its aux_loss on a tiny batch is"):
        plan_router_loss(model, None, trial=True)

    def silent(*args: Any, **options: Any) -> Any:
        return forward(*args, **{**options, "output_router_logits": False})

    monkeypatch.setattr(model, "forward", silent)
    with pytest.raises(ValueError, match="it gives no router_logits and aux_loss when asked for them"):
        plan_router_loss(model, None, trial=True)
