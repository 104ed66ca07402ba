"""One optimizer step is that of its global batch: in one process, against the plain formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_trainer.conftest import VOCAB
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import Trainer, TrainerCallback

from robust_dpo.losses import available_losses, pairwise_loss, register_loss
from robust_dpo.losses.pairs import Pair
from robust_dpo.trainer import RobustDPOTrainer
from robust_dpo.trainer.nonfinite import NonFiniteLossError

CLIP, RATE, BETA, LAMBDA = 0.05, 0.1, 0.1, 0.05
OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "erm": lambda x, h: x.mean(),
    "reweight": lambda x, h: (h * x).mean(),
    "dro": lambda x, h: LAMBDA * ((x / LAMBDA).logsumexp(0) - math.log(len(x))),
    "dora": lambda x, h: LAMBDA * ((h * x / LAMBDA).logsumexp(0) - math.log(len(x))),
    "dora_outside": lambda x, h: h.mean() * LAMBDA * ((x / LAMBDA).logsumexp(0) - math.log(len(x))),
}
LAYOUTS = [(12, 1), (5, 3), (1, 12)]


def by_the_formula(mode: str, model: Any, reference: Any, rows: list[dict[str, Any]], steps: int, logps: Any) -> Any:
    """Weights and losses of SGD with clipping on all rows at once, by autograd through the model's own logits."""
    model, reference = model.double(), reference.double()
    losses = []
    for batch in rows[:steps]:
        model.zero_grad()
        with torch.no_grad():
            anchor = logps(reference, batch)
        ratios = (logps(model, batch) - anchor).view(-1, 2)
        loss = OBJECTIVES[mode](-logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])), batch["calibration"].double())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
        losses.append(float(loss.detach()))
    return {name: value.detach().float() for name, value in model.named_parameters()}, losses


class _Ids(TrainerCallback):
    """Ids of the groups of each optimizer step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.steps: list[list[str]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([name for name, _ in self.trainer.worst_groups(1000)])


@pytest.fixture
def train(make_trainer: Callable[..., Any], build_model: Callable[..., Any], build_rows: Callable[..., Any]) -> Any:
    """Options → a trainer that was run, and the ids of its steps."""

    def run(**options: Any) -> tuple[Any, list[list[str]]]:
        ids = _Ids()
        defaults = {
            "train_dataset": build_rows(12, probs=lambda rng: rng.random()),
            "callbacks": [ids],
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "learning_rate": RATE,
            "max_grad_norm": CLIP,
            "mode": "dora",
            "lam": None if options.keys() & {"robust", "radius"} else LAMBDA,
        }
        if not options.keys() & {"peft_config", "ref_model"}:
            defaults["ref_model"] = build_model(seed=1)
        trainer = make_trainer(options.pop("model", None), **{**defaults, **options})
        ids.trainer = trainer
        trainer.train()
        return trainer, ids.steps

    return run


@pytest.mark.parametrize("route", ["one_pass", "two_pass"])
@pytest.mark.parametrize("mode", list(OBJECTIVES))
def test_every_layout_is_the_formula_on_the_global_batch(
    mode: str, route: str, train: Any, build_model: Any, whole_batch: Any, response_logps: Any
) -> None:
    if mode == "dora_outside":
        route = "auto"  # which needs two passes
    for size, accumulation in LAYOUTS:
        trainer, steps = train(
            mode=mode,
            robust_route=route,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        assert all(sorted(step) == sorted(f"row-{index}" for index in range(12)) for step in steps)
        batch = whole_batch(trainer)
        batch.setdefault("calibration", torch.ones(12))
        expected, losses = by_the_formula(mode, build_model(), build_model(seed=1), [batch] * 3, 3, response_logps)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
        assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
        assert log[0]["grad_norm"] > CLIP, "clipping is active"
        for name, value in trainer.model.named_parameters():
            torch.testing.assert_close(value.detach(), expected[name], rtol=1e-5, atol=1e-6, msg=f"{size}: {name}")


@pytest.mark.parametrize(
    "options",
    [
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
        {"head_route": "logits"},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"optim": "adamw_torch_fused", "learning_rate": 1e-3},
        {"disable_dropout": False},
        pytest.param({"torch_compile": True}, marks=pytest.mark.slow),
    ],
    ids=["lora", "logits", "checkpointing", "bf16", "adamw", "dropout-of-0", "compiled"],
)
def test_layouts_agree_whatever_is_trained(options: dict[str, Any], train: Any) -> None:
    ends = []
    for size, accumulation in ((12, 1), (4, 3)):
        torch.manual_seed(0)
        trainer, _ = train(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **options)
        ends.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
    # bf16 rounds products of other shapes in another order; a difference of weights would be a hundred times that.
    tolerance = 2e-4 if "bf16" in options else 2e-6
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=tolerance, msg=name)


COUPLED: dict[str, dict[str, Any]] = {
    "aot": {"loss_type": "aot", "mode": "erm"},
    "aot-calibrated": {"loss_type": "aot_unpaired", "mode": "dora"},
    "cvar": {"robust": "cvar", "mode": "erm"},
    "chi2": {"robust": "chi2", "robust_options": {"lam": 0.1}, "mode": "dora"},
    "sft": {"sft_weight": 0.5},
    # From the reference on, all groups tie in the first step: only what rounds alike in every layout has one answer.
    "cvar-ties": {"robust": "cvar", "robust_options": {"share": 0.3}, "mode": "erm", "ref_model": None},
    "radius-ties": {"radius": 0.1, "mode": "dro", "ref_model": None},
    "chi2-radius-ties": {"robust": "chi2_radius", "mode": "erm", "ref_model": None},
    "aot-unpaired-ties": {"loss_type": "aot_unpaired", "mode": "dro", "ref_model": None},
    "sft-and-cvar": {"sft_weight": 0.5, "robust": "cvar"},
}


@pytest.mark.parametrize("name", list(COUPLED))
def test_layouts_agree_whatever_couples_the_groups(name: str, train: Any) -> None:
    """The first is one micro-batch, where the operator solves a tilt of a loss that couples groups by itself."""
    ends = []
    for size, accumulation in LAYOUTS:
        trainer, _ = train(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **COUPLED[name])
        log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        ends.append(({key: value.detach() for key, value in trainer.model.named_parameters()}, log))
    for weights, log in ends[1:]:
        assert log == pytest.approx(ends[0][1], rel=1e-5)
        for key, value in weights.items():
            torch.testing.assert_close(value, ends[0][0][key], rtol=0, atol=3e-6, msg=key)


@pytest.mark.parametrize(
    "options", [{"lam": LAMBDA}, {"lam": LAMBDA, "sft_weight": 0.5}, {"robust": "cvar"}], ids=["tilt", "sft", "cvar"]
)
def test_the_loss_of_a_batch_by_itself_is_the_objective_of_an_evaluation(
    options: dict[str, Any], make_trainer: Any, build_model: Any, build_rows: Any, whole_batch: Any
) -> None:
    rows = build_rows(12, probs=lambda rng: rng.random())
    trainer = make_trainer(ref_model=build_model(seed=1), train_dataset=rows, eval_dataset=rows, mode="dora", **options)
    expected = trainer.evaluate()["eval_loss"]
    for training in (False, True):
        trainer.model.train(training)
        loss, output = trainer.compute_loss(trainer.model, whole_batch(trainer), return_outputs=True)
        assert output.loss.item() == pytest.approx(expected, rel=1e-5)
        assert output.weights.sum().item() == pytest.approx(1.0)
        loss.backward()


def test_outputs_of_both_routes_agree(train: Any) -> None:
    """Within a step of one micro-batch; what trains in two passes is not what is minimised."""
    found: list[Any] = []

    def keep(trainer: RobustDPOTrainer, *args: Any, **kwargs: Any) -> Any:
        loss, output = ran(trainer, *args, **{**kwargs, "return_outputs": True})
        found.append(output)
        return loss

    ran = RobustDPOTrainer.compute_loss
    for route in ("one_pass", "two_pass"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RobustDPOTrainer, "compute_loss", keep)
            train(robust_route=route, per_device_train_batch_size=12, max_steps=1)
    one, two = found
    for name in ("loss", "group_losses", "weights", "ess", "parameter"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("route", ["one_pass", "two_pass"])
def test_names_groups_that_only_training_finds_no_number_for(route: str, train: Any) -> None:
    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            def spoil(module: Any, inputs: Any, output: Any) -> Any:
                return output * torch.nan if module.training else output

            model.get_input_embeddings().register_forward_hook(spoil)

    with pytest.raises(NonFiniteLossError, match="row-"):
        train(robust_route=route, per_device_train_batch_size=12, callbacks=[Spoil()], on_nonfinite="stop")


@pytest.mark.parametrize("route", ["one_pass", "two_pass"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_reference_that_gives_no_number_is_named_by_its_group(
    policy: str, route: str, train: Any, build_model: Any, build_rows: Any
) -> None:
    """A token that one group alone has is no number in its embedding."""
    rows, reference = build_rows(12, probs=lambda rng: rng.random()), build_model(seed=1)
    rows[7]["prompt"] += " unknown"
    with torch.no_grad():
        reference.get_input_embeddings().weight[VOCAB["<unk>"]] = float("nan")
    options = {"train_dataset": rows, "ref_model": reference, "robust_route": route, "on_nonfinite": policy}
    options |= {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "max_steps": 1}
    if policy == "stop":
        with pytest.raises(NonFiniteLossError, match=r"optimizer step 1 is not finite.*: row-7\."):
            train(**options)
    else:
        trainer, _ = train(**options)
        assert trainer.state.log_history[0]["robust/skipped_steps"] == 1


def test_micro_batch_scope_depends_on_the_layout(train: Any) -> None:
    """What the tests above would find if weights did not span the global batch."""
    with pytest.warns(UserWarning, match="the objective depends on how the batch is cut"):
        (one, _), (other, _) = (
            train(robust_scope="micro_batch", per_device_train_batch_size=size, gradient_accumulation_steps=12 // size)
            for size in (12, 4)
        )
    differences = [
        float((mine - theirs).abs().max().detach())
        for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True)
    ]
    assert max(differences) > 1e-4


def test_epochs_that_end_in_a_window_lose_and_repeat_nothing(train: Any, build_rows: Any) -> None:
    rows = build_rows(11, probs=lambda rng: rng.random())
    _, steps = train(
        train_dataset=rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=-1,
        num_train_epochs=2,
    )
    assert [len(step) for step in steps] == [8, 3, 8, 3]
    for epoch in (steps[:2], steps[2:]):
        assert sorted(name for step in epoch for name in step) == sorted(row["id"] for row in rows)


class _Stream(IterableDataset):
    """Rows of which nobody knows how many there are."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def test_stream_of_unknown_length(train: Any, build_rows: Any, monkeypatch: Any) -> None:
    """A window that the stream ends in is a step of its own; without care its gradients were part of the next."""
    rows = build_rows(11, probs=lambda rng: rng.random())

    def loader(self: Any) -> Any:
        return self.accelerator.prepare(
            DataLoader(_Stream(self.train_dataset), batch_size=2, collate_fn=self.data_collator)
        )

    options = {"train_dataset": rows, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    with monkeypatch.context() as patch:
        patch.setattr(RobustDPOTrainer, "get_train_dataloader", loader)
        stream, steps = train(max_steps=4, **options)
    assert [len(step) for step in steps] == [8, 3, 8, 3]
    assert all(sorted(first + second) == sorted(row["id"] for row in rows) for first, second in (steps[:2], steps[2:]))
    known, _ = train(max_steps=4, train_sampling_strategy="sequential", **options)
    for mine, theirs in zip(stream.model.parameters(), known.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_optimizer_that_steps_within_backward(train: Any) -> None:
    """Refused before it is looked for: it need not be installed."""
    with pytest.raises(ValueError, match="optim: expected an optimizer that moves weights after all backward passes"):
        train(optim="adalomo", gradient_accumulation_steps=2)


class _LeaveWindow(TrainerCallback):
    """Ends the first epoch after the first micro-batch of its second step."""

    left = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and not self.left:
            self.left = control.should_epoch_stop = True


class _Orders(Sampler):
    """Another order in each epoch."""

    def __init__(self, *orders: list[int]) -> None:
        self.orders, self.epochs = orders, iter(orders)

    def __iter__(self) -> Iterator[int]:
        return iter(next(self.epochs))

    def __len__(self) -> int:
        return len(self.orders[0])


def test_a_step_that_is_left_leaves_no_gradient(train: Any, monkeypatch: Any) -> None:
    first, second, third = [*range(4)], [*range(4, 8)], [*range(8, 12)]
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    ends = []
    for orders, callbacks in (
        ((first + third + second, second + first + third), [_LeaveWindow()]),
        ((first + second + first + third,), []),
    ):
        sampler = _Orders(*orders)
        monkeypatch.setattr(RobustDPOTrainer, "_get_train_sampler", lambda self, dataset=None, sampler=sampler: sampler)
        trainer = train(callbacks=callbacks, **options)[0]
        assert trainer.state.global_step == 4
        ends.append(trainer.model)
    for mine, theirs in zip(*(model.parameters() for model in ends), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture
def steep_loss() -> str:
    """A loss that is finite at 0 and has no finite gradient there: a square root."""
    if "steep" not in available_losses():

        @register_loss("steep")
        @pairwise_loss
        def steep(pair: Pair, *, beta: float = 0.1) -> Tensor:
            return (pair.margin * 0).abs().sqrt()

    return "steep"


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_gradients_that_are_not_finite_change_nothing(
    policy: str, steep_loss: str, train: Any, build_model: Any
) -> None:
    before = {name: value.detach().clone() for name, value in build_model().named_parameters()}
    options = {"loss_type": steep_loss, "mode": "erm", "on_nonfinite": policy, "gradient_accumulation_steps": 2}
    model = build_model()
    if policy == "stop":
        with pytest.raises(NonFiniteLossError, match=r"optimizer step 1 is not finite.*none"):
            train(model=model, **options)
    else:
        trainer, _ = train(model=model, **options)
        assert trainer.state.log_history[0]["robust/skipped_steps"] == 1
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_resumed_in_the_middle_of_an_uneven_epoch(train: Any, build_rows: Any, tmp_path: Path) -> None:
    """The step that an epoch ends with has the same groups after a resume."""
    rows = build_rows(11, probs=lambda rng: rng.random())
    options = {
        "train_dataset": rows,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": -1,
        "num_train_epochs": 1,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole, steps = train(**options)
    assert [len(step) for step in steps] == [4, 4, 3]
    folder = Path(whole.args.output_dir) / "checkpoint-2"
    assert folder.is_dir()
    ran = Trainer.train

    def resume(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ran(self, resume_from_checkpoint=str(folder))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", resume)
        resumed, rest = train(**options)
    assert rest == steps[2:]
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
