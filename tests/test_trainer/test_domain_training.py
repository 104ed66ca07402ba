"""Group DRO in training: the paper's algorithm on the global batch, however it is cut, skipped or interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback

from robust_dpo.data import PreferenceCollator
from robust_dpo.errors import DataError
from robust_dpo.trainer import RobustDPOTrainer
from robust_dpo.trainer.nonfinite import NonFiniteLossError

CLIP, RATE, BETA, ETA = 0.05, 0.1, 0.1, 2.0
TOPICS = ["law", "tax", "law", "art", "law", "law", "tax", "law", "law", "art", "tax", "law"]


def by_the_formula(model: Any, reference: Any, batch: dict[str, Any], steps: int, logps: Any, calibrated: bool) -> Any:
    """Weights, losses and q of SGD with clipping on all rows at once, in float64."""
    model, reference, names = model.double(), reference.double(), sorted(set(TOPICS))
    q, found = torch.full((3,), 1 / 3, dtype=torch.float64), []
    h = batch["calibration"].double() if calibrated else torch.ones(12, dtype=torch.float64)
    members = [torch.tensor([domain == name for domain in batch["domains"]]) for name in names]
    for _ in range(steps):
        model.zero_grad()
        with torch.no_grad():
            anchor = logps(reference, batch)
        ratios = (logps(model, batch) - anchor).view(-1, 2)
        values = -h * logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1]))
        means = torch.stack([values[member].mean() for member in members])
        q = q * (ETA * means.detach()).exp()
        q = q / q.sum()
        loss = (q * means).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
        found.append({"loss": float(loss.detach())} | dict(zip(names, q.tolist(), strict=True)))
    return {name: value.detach().float() for name, value in model.named_parameters()}, found


def logged(trainer: RobustDPOTrainer) -> list[dict[str, float]]:
    """Loss and weights of the domains, step by step."""
    prefix = "robust/domain_weight/"
    return [
        {"loss": entry["loss"]}
        | {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.fixture
def rows(build_rows: Callable[..., Any]) -> list[dict[str, Any]]:
    """Twelve rows of three topics."""
    made = build_rows(12, probs=lambda rng: rng.random())
    return [{**row, "topic": topic} for row, topic in zip(made, TOPICS, strict=True)]


@pytest.fixture
def make(make_trainer: Callable[..., Any], build_model: Callable[..., Any], rows: Any) -> Callable[..., Any]:
    """Options → a trainer of twelve groups a step."""

    def call(**options: Any) -> RobustDPOTrainer:
        defaults: dict[str, Any] = {
            "train_dataset": rows,
            "ref_model": build_model(seed=1),
            "domain_column": "topic",
            "robust": "group_dro",
            "robust_options": {"step_size": ETA},
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "learning_rate": RATE,
            "max_grad_norm": CLIP,
            "per_device_train_batch_size": 12,
        }
        trainer: RobustDPOTrainer = make_trainer(**{**defaults, **options})
        return trainer

    return call


@pytest.mark.parametrize("mode", ["dro", "dora"])
def test_every_layout_is_the_formula_on_the_global_batch(
    mode: str, make: Any, build_model: Any, whole_batch: Any, response_logps: Any
) -> None:
    for size, accumulation, route in ((12, 1, "auto"), (12, 1, "two_pass"), (5, 3, "auto"), (1, 12, "auto")):
        layout = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make(mode=mode, robust_route=route, **layout)
        trainer.train()
        expected, steps = by_the_formula(
            build_model(), build_model(seed=1), whole_batch(trainer), 3, response_logps, mode == "dora"
        )
        for found, wanted in zip(logged(trainer), steps, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)
        for name, value in trainer.model.named_parameters():
            torch.testing.assert_close(value.detach(), expected[name], rtol=1e-5, atol=1e-6, msg=f"{size}: {name}")


def test_steps_that_lack_a_domain_do_not_depend_on_the_layout(make: Any) -> None:
    ends, logs = [], []
    for size in (4, 2, 1):
        trainer = make(per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_steps=6)
        trainer.train()
        ends.append(torch.cat([value.detach().flatten() for value in trainer.model.parameters()]))
        logs.append(logged(trainer))
    for end, log in zip(ends[1:], logs[1:], strict=True):
        torch.testing.assert_close(end, ends[0], rtol=0, atol=2e-6)
        for found, wanted in zip(log, logs[0], strict=True):
            assert found == pytest.approx(wanted, rel=1e-4)


def test_evaluation_takes_the_weights_as_they_are(make: Any, rows: Any) -> None:
    trainer = make(eval_dataset=rows, max_steps=2)
    trainer.train()
    robust, before = trainer.objective.robust, trainer.objective.robust.weights.clone()
    ends = [trainer.evaluate()["eval_loss"]]
    trainer.args.per_device_eval_batch_size = 5
    ends.append(trainer.evaluate()["eval_loss"])
    losses = torch.from_numpy(trainer.predict(rows).predictions[:, 0])
    labels = robust.labels_of(TOPICS)
    means = torch.stack([losses[labels == domain].mean() for domain in range(3)])
    assert ends == pytest.approx([float(before @ means)] * 2, rel=1e-6)
    assert torch.equal(robust.weights, before)


def test_evaluation_of_a_part_of_the_domains_is_a_mean_over_them(make: Any, rows: Any) -> None:
    parts = {name: [row for row in rows if row["topic"] in name.split("-")] for name in ("art", "law", "art-tax")}
    trainer = make(eval_dataset=parts, max_steps=2)
    trainer.train()
    weights = dict(zip(trainer.objective.robust.domains, trainer.objective.robust.weights.tolist(), strict=True))
    for part in parts.values():
        losses = trainer.predict(part).predictions[:, 0]
        topics = [row["topic"] for row in part]
        means = {each: losses[[topic == each for topic in topics]].mean() for each in set(topics)}
        expected = sum(weights[each] * mean for each, mean in means.items()) / sum(weights[each] for each in means)
        found = trainer.evaluate(part)
        assert found["eval_loss"] == pytest.approx(expected, rel=1e-6)
        by_name = {f"eval_domain_loss/{each}": mean for each, mean in means.items()}
        assert {key: found[key] for key in found if "domain_loss/" in key} == pytest.approx(by_name, rel=1e-6)
        assert found["eval_worst_domain_loss"] == pytest.approx(max(means.values()), rel=1e-6)


def test_the_best_model_may_be_that_of_the_least_worst_domain(make: Any, rows: Any) -> None:
    """Which does not change with q, as the objective does: here the model stays as it is."""
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "worst_domain_loss"}
    trainer = make(eval_dataset=rows, learning_rate=0.0, mode="dora", **often, **best)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logs[0]["eval_loss"] < logs[1]["eval_loss"] < logs[0]["eval_worst_domain_loss"]
    assert logs[1]["eval_worst_domain_loss"] == pytest.approx(logs[0]["eval_worst_domain_loss"])
    assert trainer.state.best_metric == pytest.approx(logs[0]["eval_worst_domain_loss"])


def test_no_robustness_is_logged_where_there_is_none(make: Any, rows: Any) -> None:
    cases: list[tuple[dict[str, Any], bool]] = [
        ({}, False),
        ({"robust": "cvar", "robust_options": {"share": 0.5}}, False),
        ({"robust": "chi2_radius", "robust_options": None}, False),
        ({"robust": "chi2", "robust_options": {"lam": 0.5}}, True),
    ]
    for options, told in cases:
        trainer = make(eval_dataset=rows, max_steps=1, **options)
        trainer.train()
        names = {name for entry in trainer.state.log_history for name in entry} | {*trainer.evaluate()}
        assert ("robust/lambda" in names) is ("eval_robust/lambda" in names) is told
        assert {"robust/ess", "eval_robust/ess"} <= names


def spoil_loss(trainer: RobustDPOTrainer, when: Callable[[], bool]) -> None:
    """Make what is backpropagated not finite, of group losses that are."""
    forward = trainer._window._weighting._forward

    def spoilt(*arguments: Any) -> Any:
        output = forward(*arguments)
        return replace(output, loss=output.loss * torch.nan) if when() else output

    trainer._window._weighting._forward = spoilt


class _Weights(TrainerCallback):
    """Weights of the domains after each step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(self.trainer.objective.robust.weights.clone())


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_step_that_is_left_out_moves_nothing(
    what: str, optim: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = _Weights()
    after.trainer = trainer = make(optim=optim, on_nonfinite="skip", callbacks=[after], max_steps=3)
    if what == "gradient":
        norm = RobustDPOTrainer._get_grad_norm

        def spoilt_norm(self: Any, model: Any, grad_norm: Any = None) -> Any:
            if self.state.global_step == 1:
                next(model.parameters()).grad[0] = torch.nan
                grad_norm = torch.tensor(torch.nan)
            return norm(self, model, grad_norm)

        monkeypatch.setattr(RobustDPOTrainer, "_get_grad_norm", spoilt_norm)
    else:
        spoil_loss(trainer, lambda: trainer.state.global_step == 1)
    trainer.train()
    first, second, third = after.weights
    assert torch.equal(second, first) and not torch.equal(third, second)
    assert third.isfinite().all()


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
def test_a_step_that_stops_the_training_moves_nothing(optim: str, make: Any) -> None:
    trainer = make(optim=optim)
    before = trainer.objective.robust.weights.clone()
    spoil_loss(trainer, lambda: True)
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    assert torch.equal(trainer.objective.robust.weights, before)


def test_rows_of_other_domains_are_refused(make: Any, rows: Any) -> None:
    other = [{**rows[0], "topic": "prose"}]
    with pytest.raises(
        DataError, match=r"eval_dataset: domains: expected names among 'art', 'law', 'tax', got 'prose'"
    ):
        make(eval_dataset={"a": rows, "b": other})
    trainer = make()
    with pytest.raises(DataError, match=r"eval_dataset: domains: .*'prose'"):
        trainer.evaluate(other)
    names = ["art", "law", "prose", "tax"]
    known = make(robust_options={"domains": names}, eval_dataset=other)
    assert known.objective.robust.domains == tuple(names)
    with pytest.raises(ValueError, match="domains: expected names among 'law', got 'art', 'tax'"):
        make(robust_options={"domains": ["law"]})


def test_batches_without_domains_are_refused(make: Any, tokenizer: Any) -> None:
    collator = PreferenceCollator.for_tokenizer(tokenizer)

    def collate(rows: Any) -> dict[str, Any]:
        return {name: value for name, value in collator(rows).items() if name != "domains"}

    with pytest.raises(
        ValueError, match=r"data_collator: expected one that gives `domains`, .*, got a batch of input_ids"
    ):
        make(data_collator=collate).train()


def test_weights_of_a_micro_batch_are_refused(make: Any) -> None:
    with pytest.raises(
        ValueError, match=r"robust_scope: expected 'global_batch' with group_dro, .*, got 'micro_batch'"
    ):
        make(robust_scope="micro_batch")
