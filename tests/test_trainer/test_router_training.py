"""Training mixtures of experts: one step is that of its global batch, with the auxiliary loss of all its tokens."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

CLIP, RATE, BETA, LAMBDA, COEFFICIENT = 0.05, 0.1, 0.1, 0.05, 0.3
LAYOUTS = [(12, 1), (5, 3), (1, 12)]
STEPS = 3


@pytest.fixture
def experts(build_model: Callable[..., Any]) -> Callable[..., Any]:
    """seed, configuration fields → a tiny Mixtral whose loss is on."""

    def build(seed: int = 0, **fields: Any) -> Any:
        options = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT, **fields}
        # Products as in training, where it is not in float64.
        return build_model("mixtral-experts", seed, experts_implementation=None, **options)

    return build


@pytest.fixture
def train(make_trainer: Callable[..., Any], experts: Callable[..., Any], build_rows: Callable[..., Any]) -> Any:
    """Options → a trainer that was run."""

    def run(size: int = 4, accumulation: int = 3, **options: Any) -> Any:
        defaults = {
            "train_dataset": build_rows(12, probs=lambda rng: rng.random()),
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "learning_rate": RATE,
            "max_grad_norm": CLIP,
            "max_steps": STEPS,
            "mode": "dora",
            "lam": None if "robust" in options else LAMBDA,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
        }
        model = options.pop("model", None)
        if "peft_config" not in options:
            defaults["ref_model"] = experts(seed=1)
        torch.manual_seed(0)
        trainer = make_trainer(experts() if model is None else model, **{**defaults, **options})
        trainer.train()
        return trainer

    return run


def _log(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def _aux_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """That of transformers, with the last token of each response hidden, which none sees."""
    followed = torch.nn.functional.pad(batch["attention_mask"][:, 1:], (0, 1))
    aux_loss: Tensor = model(input_ids=batch["input_ids"], attention_mask=followed).aux_loss
    return aux_loss


def by_the_formula(
    model: nn.Module, reference: nn.Module, batches: list[dict[str, Any]], logps: Any, per_step: int = 1
) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Weights, losses and auxiliary losses of SGD with clipping, by autograd through the model's own `aux_loss`.

    Each step has `per_step` of the batches; its loss is the mean over them.
    """
    model, reference = model.double(), reference.double()
    model.set_experts_implementation("eager")
    reference.set_experts_implementation("eager")
    losses, balances = [], []
    for first in range(0, len(batches), per_step):
        model.zero_grad()
        parts = []
        for batch in batches[first : first + per_step]:
            with torch.no_grad():
                anchor = logps(reference, batch)
            ratios = (logps(model, batch) - anchor).view(-1, 2)
            scores = batch["calibration"].double() * -logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])) / LAMBDA
            robust = LAMBDA * (scores.logsumexp(0) - torch.tensor(float(len(scores))).log())
            aux = _aux_loss(model, batch)
            parts.append((robust + COEFFICIENT * aux, aux))
        loss, aux = (torch.stack(each).mean() for each in zip(*parts, strict=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
        losses.append(float(loss.detach()))
        balances.append(float(aux.detach()))
    return {name: value.detach().float() for name, value in model.named_parameters()}, losses, balances


@pytest.mark.parametrize("layout", ["group", "packed", "padded"])
def test_every_cut_is_the_formula_on_the_global_batch(
    layout: str, train: Any, experts: Any, whole_batch: Any, response_logps: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """With the aux_loss that transformers computes for the whole padded batch, in whatever layout we train."""
    for size, accumulation in LAYOUTS:
        with caplog.at_level(logging.WARNING):
            trainer = train(size, accumulation, layout=layout)
        assert "the auxiliary loss of its routers couples all tokens of a step" in caplog.text
        batches = [whole_batch(trainer)] * STEPS
        expected, losses, balances = by_the_formula(experts(), experts(seed=1), batches, response_logps)
        assert [entry["loss"] for entry in _log(trainer)] == pytest.approx(losses, rel=1e-5)
        assert [entry["aux_loss"] for entry in _log(trainer)] == pytest.approx(balances, rel=1e-5)
        assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / STEPS, rel=1e-5)
        assert _log(trainer)[0]["grad_norm"] > CLIP, "clipping is active"
        for name, value in _weights(trainer).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6, msg=f"{size}: {name}")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "packed"},
        {"layout": "group", "layout_row_tokens": 64},
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
        {"head_route": "logits"},
        {"gradient_checkpointing": True},
        {"robust": "cvar", "robust_options": {"share": 0.5}},
        {"sft_weight": 0.2},
        {"loss_type": "ipo", "mode": "erm"},
        pytest.param({"torch_compile": True}, marks=pytest.mark.slow),
    ],
    ids=["group", "packed", "rows-with-gaps", "lora", "logits", "checkpointing", "cvar", "sft", "ipo", "compiled"],
)
def test_cuts_agree_whatever_is_trained(options: dict[str, Any], train: Any) -> None:
    ends, logs = [], []
    for size, accumulation in LAYOUTS:
        # PEFT changes its configuration.
        trainer = train(size, accumulation, **copy.deepcopy(options))
        ends.append(_weights(trainer))
        logs.append(_log(trainer))
    for other, log in zip(ends[1:], logs[1:], strict=True):
        for name, value in ends[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=2e-6, msg=name)
        for metric in ("loss", "aux_loss", "grad_norm"):
            assert [entry[metric] for entry in log] == pytest.approx([entry[metric] for entry in logs[0]], rel=1e-4)


def test_the_auxiliary_loss_is_what_makes_the_difference(train: Any) -> None:
    """And evens the load, where it is most of the objective."""
    without = train(router_aux_loss_coef=0.0)
    assert all("aux_loss" not in entry for entry in _log(without))
    logs = [_log(train(router_aux_loss_coef=coefficient, max_steps=8)) for coefficient in (1e-6, 10.0)]
    start, (idle, balanced) = logs[0][0]["aux_loss"], (log[-1]["aux_loss"] for log in logs)
    assert logs[1][0]["aux_loss"] == pytest.approx(start)
    assert balanced < min(start, idle) - 1e-3


def test_micro_batch_scope_is_that_of_transformers(
    train: Any, experts: Any, whole_batch: Any, response_logps: Any
) -> None:
    """The mean over micro-batches of what the model says of each by itself, which depends on the cut."""
    with pytest.warns(UserWarning, match="the objective depends on how the batch is cut"):
        trainer = train(4, 3, layout="padded", robust_scope="micro_batch", train_sampling_strategy="sequential")
    rows = [*trainer.train_dataset]
    parts = [trainer.data_collator(rows[first : first + 4]) for first in (0, 4, 8)]
    expected, losses, balances = by_the_formula(experts(), experts(seed=1), parts * STEPS, response_logps, per_step=3)
    assert [entry["loss"] for entry in _log(trainer)] == pytest.approx(losses, rel=1e-5)
    assert [entry["aux_loss"] for entry in _log(trainer)] == pytest.approx(balances, rel=1e-5)
    for name, value in _weights(trainer).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("layout", ["padded", "group"])
def test_evaluation_is_over_the_whole_data_set(layout: str, train: Any, build_rows: Any, experts: Any) -> None:
    rows = build_rows(11, seed=5, probs=lambda rng: rng.random())
    results = []
    for size in (11, 3):
        trainer = train(layout=layout, eval_dataset=rows, per_device_eval_batch_size=size, learning_rate=0.0)
        results.append(trainer.evaluate())
    for metric in ("eval_loss", "eval_aux_loss"):
        assert results[1][metric] == pytest.approx(results[0][metric], rel=1e-5)
    batch = trainer.data_collator([*trainer.eval_dataset])
    expected = float(_aux_loss(experts().eval(), batch).detach())
    assert results[0]["eval_aux_loss"] == pytest.approx(expected, rel=1e-5)
    plain = train(layout=layout, eval_dataset=rows, router_aux_loss_coef=0.0, learning_rate=0.0).evaluate()
    assert results[0]["eval_loss"] == pytest.approx(
        plain["eval_loss"] + COEFFICIENT * results[0]["eval_aux_loss"], rel=1e-5
    )


def test_a_coefficient_asks_for_the_loss_and_one_pass_cannot_give_it(make_trainer: Any, experts: Any) -> None:
    silent = {"model": experts(output_router_logits=False), "gradient_accumulation_steps": 2}
    assert make_trainer(**silent).objective.router_coefficient == 0
    assert make_trainer(**silent, router_aux_loss_coef=0.02).objective.router_coefficient == 0.02
    with pytest.raises(ValueError, match="robust_route: expected 'auto' or 'two_pass': the auxiliary loss of its"):
        make_trainer(**silent, router_aux_loss_coef=0.02, robust_route="one_pass")
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected"):
        make_trainer(router_aux_loss_coef=-0.1)
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected 0 or None for LlamaForCausalLM"):
        make_trainer(router_aux_loss_coef=0.1)


def test_checkpoints_that_carry_no_gradient_are_refused(make_trainer: Any, experts: Any) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="gradient_checkpointing_kwargs: expected use_reentrant=False"):
        make_trainer(experts(), **options)
    assert make_trainer(experts(), router_aux_loss_coef=0.0, **options).objective.router_coefficient == 0


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"preserve_rng_state": False}], ids=str)
def test_checkpoints_that_the_model_brings_are_looked_at(options: Any, make_trainer: Any, experts: Any) -> None:
    """Where nothing is said torch takes the reentrant form."""
    model = experts()
    model.activation_checkpointing_enable(options)
    expected = (
        r"model: expected one whose checkpoints say use_reentrant=False, .* got Mixtral.* with functools\.partial"
    )
    with pytest.raises(ValueError, match=expected):
        make_trainer(model)
    assert make_trainer(model, router_aux_loss_coef=0.0).objective.router_coefficient == 0
    # They are replaced when the training begins.
    assert make_trainer(model, gradient_checkpointing=True).objective.router_coefficient == COEFFICIENT


@pytest.mark.parametrize("asked", [None, {}, {"preserve_rng_state": False}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize("brought", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpoints_carry_the_gradient_of_the_auxiliary_loss(
    asked: Any, brought: Any, train: Any, experts: Any
) -> None:
    model = experts()
    if brought is not None:
        model.activation_checkpointing_enable(brought)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": asked}
    found = _weights(train(model=model, router_aux_loss_coef=10.0, max_steps=1, **options))
    for name, value in _weights(train(router_aux_loss_coef=10.0, max_steps=1)).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6, msg=name)


def test_checkpoints_of_the_model_carry_the_gradient_of_the_auxiliary_loss(train: Any, experts: Any) -> None:
    model = experts()
    model.activation_checkpointing_enable()
    found = _weights(train(model=model, router_aux_loss_coef=10.0, max_steps=1))
    for name, value in _weights(train(router_aux_loss_coef=10.0, max_steps=1)).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6, msg=name)
