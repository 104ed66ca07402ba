"""Which models share prompts, and why others do not: by what they declare, and by what they compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from robust_dpo.layout import (
    AttentionBackend,
    Group,
    LayoutPlan,
    LayoutUnsupportedError,
    attention,
    pack_groups,
    plan_layout,
    register_backend,
)
from robust_dpo.layout.choice import why_layouts_differ
from robust_dpo.layout.dense import SDPA
from robust_dpo.layout.segments import SEGMENTS

_SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_INTERFACE = "its attention does not go through transformers' attention interface"
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "alibi": ("BloomConfig", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}, _INTERFACE),
    "state-space": ("MambaConfig", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}, _INTERFACE),
    "own-attention": ("StableLmConfig", _WIDE, _INTERFACE),
    "sinks": (
        "GptOssConfig",
        {**_WIDE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _ROPE},
        "its attention takes s_aux",
    ),
    "convolutions": (
        "Lfm2Config",
        {**_WIDE, "layer_types": ["conv", "full_attention"]},
        "it has layers of the kind conv",
    ),
    "scaled-by-place": (
        "Llama4TextConfig",
        {**_WIDE, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
        "its attention is scaled by the place in the row",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize(
    "family", ["llama", "qwen2-window", "qwen3", "mistral-window", "gemma2", "gpt2-learned-positions", "llama4-chunks"]
)
def test_models_that_share_prompts(
    family: str, attention: str, dtype: torch.dtype, build_model: Callable[..., Any]
) -> None:
    model = build_model(family).to(dtype)
    plan = plan_layout(model, attention=attention)
    assert (plan.kind, plan.reason) == ("group", "")
    assert plan.attention is {"auto": SEGMENTS, "sdpa": SDPA}[attention]
    assert all(module.training for module in model.modules())
    assert plan_layout(model, "packed").kind == "packed"
    assert plan_layout(model, "padded") == LayoutPlan("padded")


@pytest.mark.parametrize("name", list(OTHERS))
def test_models_that_cannot(name: str) -> None:
    config, fields, reason = OTHERS[name]
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**fields))
    for layout in ("auto", "group", "packed"):
        assert plan_layout(model, layout) == LayoutPlan("padded", reason=reason)


def test_adapters(build_model: Callable[..., Any]) -> None:
    adapted = get_peft_model(build_model("llama"), LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert plan_layout(adapted).kind == "group"
    virtual = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    prompted = get_peft_model(build_model("llama"), virtual)
    assert plan_layout(prompted) == LayoutPlan("padded", reason="its adapter puts virtual tokens in front of every row")


def test_no_positions(build_model: Callable[..., Any]) -> None:
    class Bare(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
            return super().forward(input_ids, attention_mask, **options)

    assert plan_layout(Bare(build_model("llama").config)).reason == "it takes no position_ids"


def _mixes_neighbours(model: Any) -> None:
    """A short convolution over places, as some models have before their attention."""

    def mix(_: nn.Module, __: Any, hidden: Tensor) -> Tensor:
        return hidden + 0.5 * hidden.roll(1, 1)

    model.model.embed_tokens.register_forward_hook(mix)


def _counts_places(model: Any) -> None:
    """Rotations by place in the row, whatever the positions are: right where a response stands behind its prompt."""

    def ignore(_: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        positions = torch.arange(args[0].shape[1])[None]
        return args, {**options, "position_ids": positions}

    model.model.rotary_emb.register_forward_pre_hook(ignore, with_kwargs=True)


def _has_its_own_attention(model: Any) -> None:
    """Every token sees all before it in the row, whatever the mask is."""

    def attend(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        means = hidden_states.cumsum(1) / torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return means, None

    model.model.layers[1].self_attn.forward = attend


@pytest.mark.parametrize(
    ("change", "kind"),
    [(_mixes_neighbours, "padded"), (_counts_places, "packed"), (_has_its_own_attention, "padded")],
)
def test_what_no_declaration_says_is_found_by_running(
    change: Callable[[Any], None], kind: str, build_model: Callable[..., Any]
) -> None:
    model = build_model("llama")
    change(model)
    plan = plan_layout(model)
    assert plan.kind == kind
    assert "of their size with the layout 'group'" in plan.reason


def test_the_probe_sees_a_leak(build_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A response that sees the one before it, in a model with the small weights of an untrained one."""
    model = build_model("llama", initializer_range=0.02)
    assert why_layouts_differ(model, LayoutPlan("group", SDPA)) == ""
    leaky = LayoutPlan("group", SDPA)
    monkeypatch.setattr(LayoutPlan, "pack", _pack_with_a_leak)
    assert "logits change" in why_layouts_differ(model, leaky)


def _pack_with_a_leak(plan: LayoutPlan, groups: list[Group]) -> Any:
    packed = pack_groups(groups)
    packed.response_ids.clamp_(max=1)
    return packed


def _broken(kind: type[Exception]) -> AttentionBackend:
    def attend(*_: Any, **__: Any) -> Any:
        raise kind("no kernel for heads 8 wide")

    return dataclasses.replace(SDPA, name="broken", attend=attend)


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError])
def test_the_next_backend_stands_by(
    kind: type[Exception],
    build_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(attention, "_BACKENDS", {})
    for backend in (_broken(kind), SDPA):
        register_backend(backend)
    model = build_model("llama")
    plan = plan_layout(model)
    assert (plan.kind, plan.attention, plan.reason) == ("group", SDPA, "")
    expected = f"layout_attention 'broken' fails on this model: {kind.__name__}: no kernel for heads 8 wide"
    assert expected in caplog.text
    assert model.config._attn_implementation == "eager"
    with pytest.raises(kind, match="no kernel for heads 8 wide"):
        plan_layout(model, attention="broken")


def test_without_another_backend_rows_are_padded(
    build_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BACKENDS", {})
    register_backend(_broken(TypeError))
    assert plan_layout(build_model("llama")) == LayoutPlan("padded", reason="attention 'broken' fails on it")


HANDLE_MASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "passed by name": (
        "AfmoeConfig",
        {**_WIDE, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "read": ("DogeConfig", {**_WIDE, "keep_window_size": 64}),
    "cut": (
        "Gemma4TextConfig",
        {
            **_WIDE,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "global_head_dim": 16,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "sliding_window": 16,
        },
    ),
}


@pytest.mark.parametrize("name", list(HANDLE_MASKS))
def test_models_that_handle_their_masks(name: str) -> None:
    """Where a backend's mask is no tensor, the model's code fails, and the next backend stands by."""
    config, fields = HANDLE_MASKS[name]
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**fields))
    plan = plan_layout(model)
    assert plan.kind == "group", plan.reason


def _refuses_dropout(module: nn.Module, *args: Any, dropout: float = 0.0, **options: Any) -> Any:
    if dropout:
        raise LayoutUnsupportedError("its attention has dropout")
    return SDPA.attend(module, *args, **options)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()


def _cannot_go_back(*args: Any, **options: Any) -> Any:
    out, weights = SDPA.attend(*args, **options)
    return _NoBackward.apply(out), weights


@pytest.mark.parametrize("attend", [_refuses_dropout, _cannot_go_back])
def test_backends_that_fail_in_training_only(
    attend: Callable[..., Any], build_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BACKENDS", {})
    for backend in (dataclasses.replace(SDPA, name="picky", attend=attend), SDPA):
        register_backend(backend)
    model = build_model("llama", attention_dropout=0.5).eval()
    drawn = torch.get_rng_state()
    assert plan_layout(model).attention is SDPA
    assert plan_layout(model, trains=False).attention.name == "picky"
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_checkpointed_model_is_tried_without(build_model: Callable[..., Any]) -> None:
    """The reentrant form knows only whole backward passes."""
    model = build_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert plan_layout(model).kind == "group"
    assert model.is_gradient_checkpointing


def test_refused(build_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="layout: expected one of auto, group, packed, padded, got 'rows'"):
        plan_layout(build_model("llama"), "rows")
    with pytest.raises(ValueError, match="layout_attention: expected one of auto"):
        plan_layout(build_model("llama"), attention="eager")


def test_rows_in_half_precision_on_a_cpu_have_few_lengths(
    build_model: Callable[..., Any], draw_groups: Callable[..., list[Group]]
) -> None:
    """Each length is another kernel that oneDNN compiles; MKL, which multiplies fp32, compiles none."""
    model = build_model("llama")
    groups = draw_groups(2, 3)
    places = sum(span.length for span in pack_groups(groups).spans)
    plan = plan_layout(model)
    assert plan.pack(groups).input_ids.shape == (1, places)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = plan_layout(model)
    for half in (mixed, plan_layout(model.to(torch.bfloat16))):
        assert half == dataclasses.replace(plan, row_multiple=128)
        assert half.pack(groups).input_ids.shape == (1, -(-places // 128) * 128)
