"""Which head is fused, and how the self-check finds out what the model does to its logits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from robust_dpo.trainer.head import LogitTransform, in_place_of_head, linear_head
from robust_dpo.trainer.self_check import check_head

TRANSFORMS = {
    "gemma2-softcap": LogitTransform(softcap=3.0),
    "cohere-scale": LogitTransform(logit_scale=0.25),
    "granite-divides": LogitTransform(logit_scale=0.25),
}
TOKENS = torch.tensor([[5, 9, 11, 7], [6, 2, 8, 3]])


def test_self_check_finds_the_transform(build_model: Callable[..., Any], family: str) -> None:
    model = build_model(family).train()
    check = check_head(model)
    assert check.head is model.get_output_embeddings()
    assert check.transform == TRANSFORMS.get(family, LogitTransform())
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2-softcap", "cohere-scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_self_check_allows_for_rounding(build_model: Callable[..., Any], family: str, dtype: torch.dtype) -> None:
    check = check_head(build_model(family).to(dtype))
    assert check.head is not None, check.reason
    assert check.transform == TRANSFORMS.get(family, LogitTransform())


def test_a_softcap_far_above_the_logits_is_still_found(build_model: Callable[..., Any]) -> None:
    model = build_model("gemma2-softcap", final_logit_softcapping=30.0, initializer_range=0.01)
    assert model(TOKENS).logits.abs().max() < 1  # where a softcap of 30 changes nothing that could be seen
    assert check_head(model).transform == LogitTransform(softcap=30.0)


def test_the_meaning_of_logits_scaling_is_read_off_the_model(build_model: Callable[..., Any]) -> None:
    model = build_model("llama")
    model.config.logits_scaling = 4.0  # as HyperCLOVA X: multiplies, where Granite divides

    def multiply(_: nn.Module, __: Any, output: Any) -> Any:
        output.logits = output.logits * 4.0
        return output

    model.register_forward_hook(multiply)
    assert check_head(model).transform == LogitTransform(logit_scale=4.0)


def test_captured_input_gives_the_native_logits(build_model: Callable[..., Any], family: str) -> None:
    model = build_model(family).eval()
    head = linear_head(model)
    native = model(TOKENS).logits
    with in_place_of_head(head, lambda hidden: hidden) as captured:
        assert model(TOKENS).logits.shape == (2, 0, native.shape[-1])
    (hidden,) = captured
    logits = TRANSFORMS.get(family, LogitTransform())(head(hidden))
    torch.testing.assert_close(logits, native)
    torch.testing.assert_close(model(TOKENS).logits, native)  # the head is itself again


def test_capture_ends_with_an_error_inside(build_model: Callable[..., Any]) -> None:
    model = build_model()
    head = linear_head(model)
    with pytest.raises(KeyError), in_place_of_head(head, len):
        raise KeyError
    assert model(TOKENS).logits.shape[1] == 4


def test_capture_keeps_a_forward_that_others_put_there(build_model: Callable[..., Any]) -> None:
    head = linear_head(build_model())
    theirs = head.forward
    head.forward = theirs  # as accelerate's hooks do
    with in_place_of_head(head, len):
        pass
    assert head.__dict__["forward"] == theirs


def test_unused_parameters_are_seen_from_the_output(build_model: Callable[..., Any]) -> None:
    """DistributedDataParallel looks for unused parameters in the graph of the output."""
    model = build_model("llama")
    with in_place_of_head(linear_head(model), len):
        output = model(TOKENS).logits
    reached, pending = set(), [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in reached:
            reached.add(node)
            pending += [parent for parent, _ in node.next_functions]
    variables = {id(node.variable) for node in reached if hasattr(node, "variable")}
    assert {name for name, p in model.named_parameters() if id(p) not in variables} == set()


def test_under_an_engine_the_output_leads_to_the_hidden_states_alone(build_model: Callable[..., Any]) -> None:
    """Not to the head's weight, whose gradient would be as large as itself; unless nothing else has one."""
    model = build_model("llama")
    for frozen in (False, True):
        model.model.requires_grad_(not frozen)
        with in_place_of_head(linear_head(model), torch.Tensor.sum, by_engine=True) as results:
            output = model(TOKENS).logits
        assert output.shape == (2, 0, model.config.vocab_size) and output.requires_grad and not output._is_view()
        model.zero_grad()
        (results[0] * 0 + output.sum()).backward()
        assert (model.lm_head.weight.grad is None) is not frozen
        assert (model.model.norm.weight.grad is None) is frozen


class OwnHead(nn.Linear):
    """A head of the user's with a computation of its own."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden).sin()


def _with_own_head(model: Any) -> Any:
    head = OwnHead(32, 194, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def _with_adapter_on_head(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


def _with_hidden_transform(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda module, args, output: output.sin())
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with_own_head, "the output layer is not a plain nn.Linear"),
        (_with_adapter_on_head, "the output layer is not a plain nn.Linear"),
        (_with_hidden_transform, "fused and native log-probs differ"),
    ],
)
class TestHeadsThatCannotBeFused:
    def test_auto_takes_the_logits_with_a_warning(
        self,
        change: Callable[[Any], Any],
        reason: str,
        build_model: Callable[..., Any],
        make_trainer: Callable[..., Any],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="robust_dpo"):
            trainer = make_trainer(change(build_model()))
        assert f"the model: the head is not fused with the loss, which costs memory: {reason}" in caplog.text
        loss = trainer.train().training_loss
        assert 0 < loss < 0.75

    def test_fused_refuses(
        self,
        change: Callable[[Any], Any],
        reason: str,
        build_model: Callable[..., Any],
        make_trainer: Callable[..., Any],
    ) -> None:
        with pytest.raises(ValueError, match="head_route: expected 'auto' or 'logits', for the model: " + reason):
            make_trainer(change(build_model()), head_route="fused")
