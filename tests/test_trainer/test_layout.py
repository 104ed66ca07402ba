"""Training in packed rows: the numbers of the padded layout, from fewer tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from torch import Tensor

from robust_dpo.data import PreferenceCollator
from robust_dpo.layout.segments import SEGMENTS

LAYOUTS = ("group", "packed", "padded")


def step(trainer: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """PreferenceOutput and gradients of one batch."""
    trainer.model.zero_grad()
    trainer.model.train()
    output = trainer.preference_output(trainer.model, batch)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same_step(first: tuple[Any, dict[str, Tensor]], second: tuple[Any, dict[str, Tensor]]) -> None:
    for name in ("loss", "logps", "ref_logps", "group_losses", "weights"):
        torch.testing.assert_close(getattr(first[0], name), getattr(second[0], name), rtol=1e-5, atol=2e-5)
    assert first[1].keys() == second[1].keys()
    largest = max(gradient.norm() for gradient in second[1].values())
    for name, gradient in second[1].items():
        assert (first[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("route", ["fused", "logits"])
def test_all_layouts_take_the_same_step(
    family: str,
    route: str,
    size: int,
    build_model: Callable[..., Any],
    build_rows: Callable[..., Any],
    make_trainer: Callable[..., Any],
    whole_batch: Callable[..., Any],
) -> None:
    steps = {}
    for layout in LAYOUTS:
        trainer = make_trainer(
            build_model(family),
            ref_model=build_model(family, seed=1),
            train_dataset=build_rows(6, size=size),
            loss_type="sigmoid" if size == 2 else "plackett_luce",
            beta=0.5,
            head_route=route,
            layout=layout,
            layout_row_tokens=64,
        )
        steps[layout] = step(trainer, whole_batch(trainer))
    assert_same_step(steps["group"], steps["padded"])
    assert_same_step(steps["packed"], steps["padded"])


def test_auto_shares_prompts(make_trainer: Callable[..., Any], whole_batch: Callable[..., Any]) -> None:
    trainer = make_trainer()
    packed = whole_batch(trainer)["packed"]
    assert packed.shared
    prompts = sum(len(row["prompt_ids"]) for row in trainer.train_dataset)
    run = sum(len(response) - 1 for row in trainer.train_dataset for response in row["response_ids"])
    assert packed.input_ids.numel() == prompts + run
    assert not whole_batch(make_trainer(layout="packed"))["packed"].shared
    assert "packed" not in whole_batch(make_trainer(layout="padded"))
    assert len(whole_batch(make_trainer(layout_row_tokens=40))["packed"].input_ids) > 1


def test_collator_of_the_user(make_trainer: Callable[..., Any], whole_batch: Callable[..., Any]) -> None:
    """One that knows no layout: the trainer lays its batches out."""
    expected = make_trainer()
    trainer = make_trainer()
    trainer.data_collator = PreferenceCollator(0)
    batch = whole_batch(trainer)
    assert "packed" not in batch
    assert_same_step(step(trainer, batch), step(expected, whole_batch(expected)))
    assert "packed" not in batch


class _MaskingCollator(PreferenceCollator):
    """Some tokens of the responses do not count: a turn of a tool, a masked end of sequence."""

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = super().__call__(rows)
        lengths = batch["attention_mask"].sum(1)
        for labels, length in zip(batch["labels"], lengths, strict=True):
            labels[length - 1] = labels[length // 2] = -100
            labels[(labels != -100).nonzero()[0]] = -100
        return batch


@pytest.mark.parametrize("route", ["fused", "logits"])
@pytest.mark.parametrize("layout", ["group", "packed"])
def test_labels_that_the_collator_masks(
    layout: str, route: str, build_rows: Callable[..., Any], build_model: Callable[..., Any], make_trainer: Any
) -> None:
    steps = []
    for each in (layout, "padded"):
        trainer = make_trainer(
            build_model(),
            ref_model=build_model(seed=1),
            train_dataset=build_rows(6),
            data_collator=_MaskingCollator(0),
            layout=each,
            head_route=route,
        )
        batch = trainer.data_collator([*trainer.train_dataset])
        steps.append(step(trainer, batch))
    assert_same_step(*steps)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapter_off_in_the_same_rows(
    checkpointing: bool,
    build_model: Callable[..., Any],
    make_trainer: Callable[..., Any],
    whole_batch: Callable[..., Any],
) -> None:
    steps = []
    for layout in ("group", "padded"):
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        trainer = make_trainer(
            build_model(), peft_config=config, layout=layout, gradient_checkpointing=checkpointing, beta=0.5
        )
        steps.append(step(trainer, whole_batch(trainer)))
        assert (steps[-1][0].log_ratios.abs() > 1e-3).any()
    assert_same_step(*steps)


def test_gradient_checkpointing_trains_to_the_same_weights(
    build_model: Callable[..., Any], make_trainer: Callable[..., Any]
) -> None:
    weights = []
    for checkpointing in (False, True):
        trainer = make_trainer(build_model("gemma2-softcap"), layout="group", gradient_checkpointing=checkpointing)
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
    for name, plain in weights[0].items():
        torch.testing.assert_close(weights[1][name], plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_and_metrics(
    layout: str, build_rows: Callable[..., Any], build_model: Callable[..., Any], make_trainer: Callable[..., Any]
) -> None:
    def evaluate(**options: Any) -> dict[str, float]:
        trainer = make_trainer(
            build_model(), ref_model=build_model(seed=1), eval_dataset=build_rows(7, seed=5), **options
        )
        timings = ("runtime", "per_second", "preparation_time")
        return {name: value for name, value in trainer.evaluate().items() if not name.endswith(timings)}

    assert evaluate(layout=layout) == pytest.approx(evaluate(layout="padded"), rel=1e-4, abs=1e-5)


def test_data_workers_lay_out_batches(build_rows: Callable[..., Any], make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(train_dataset=build_rows(8), dataloader_num_workers=1, max_steps=2)
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 2


def test_virtual_tokens_fall_back_with_a_warning(
    build_model: Callable[..., Any], make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with caplog.at_level(logging.WARNING, logger="robust_dpo"):
        trainer = make_trainer(build_model(), peft_config=config)
    reason = "its adapter puts virtual tokens in front of every row"
    assert f"the model: responses do not share their prompt, which costs time: {reason}" in caplog.text
    assert 0 < trainer.train().training_loss < 0.75
    with pytest.raises(ValueError, match=f"layout: expected 'auto' or 'padded' for the model: {reason}, got 'group'"):
        make_trainer(build_model(), peft_config=config, layout="group")


def test_reference_that_cannot_share(
    build_model: Callable[..., Any],
    make_trainer: Callable[..., Any],
    whole_batch: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It runs padded beside a policy that shares prompts."""

    def reference() -> Any:
        model = build_model(seed=1)
        model.model.embed_tokens.register_forward_hook(lambda _, __, hidden: hidden + 0.1 * hidden.roll(1, 1))
        return model

    with caplog.at_level(logging.WARNING, logger="robust_dpo"):
        trainer = make_trainer(build_model(), ref_model=reference())
    assert "ref_model: responses do not share their prompt" in caplog.text
    padded = make_trainer(build_model(), ref_model=reference(), layout="padded")
    batch = whole_batch(trainer)
    assert batch["packed"].shared
    assert_same_step(step(trainer, batch), step(padded, whole_batch(padded)))


def test_attention_is_the_models_own_outside_of_steps(
    make_trainer: Callable[..., Any], build_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    trainer = make_trainer(model, gradient_checkpointing=True)
    seen = []
    forward = model.model.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(model.config._attn_implementation)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", watch)
    trainer.train()
    assert seen == [SEGMENTS.implementation] * 3
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "rows"}, "layout: expected one of auto, group, packed, padded, got 'rows'"),
        ({"layout_attention": "eager"}, "layout_attention: expected one of auto, flex, flash, segments, sdpa, got"),
        ({"layout_row_tokens": 0}, "layout_row_tokens: expected at least 1, or None, got 0"),
    ],
)
def test_refused(options: dict[str, Any], message: str, make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_backend_that_cannot_run_here(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="layout_attention='flex' cannot run on cpu"):
        make_trainer(layout_attention="flex")
