"""The loss and gradients of one batch against the formulas in float64, between routes, and against TRL."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from robust_dpo.calibration import density_ratio
from robust_dpo.errors import DataError

BETA = 0.5


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), gradients(trainer.model)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name].double() - expected.double()).norm()
        assert error <= tolerance * expected.double().norm() + 1e-9, name


def test_dro_of_dpo_in_float64(
    family: str,
    build_model: Callable[..., Any],
    make_trainer: Callable[..., Any],
    whole_batch: Callable[..., Any],
    response_logps: Callable[..., Tensor],
) -> None:
    """λ log mean exp(ℓ/λ) of ℓ = −logσ(β(d_w − d_l)), from the models' own logits, and its gradients."""
    policy, other = build_model(family, seed=0), build_model(family, seed=1)
    trainer = make_trainer(policy, ref_model=other, beta=BETA, mode="dro", lam=0.7, head_route="fused")
    batch = whole_batch(trainer)
    loss, ours = loss_and_gradients(trainer, batch)

    exact, exact_ref = build_model(family, seed=0).double(), build_model(family, seed=1).double()
    with torch.no_grad():
        ref = response_logps(exact_ref, batch)
    ratios = (response_logps(exact, batch) - ref).view(-1, 2)
    losses = -logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1]))
    expected = 0.7 * ((losses / 0.7).logsumexp(0) - math.log(len(losses)))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(ours, gradients(exact), 1e-4)


def test_fused_and_logits_route_agree(
    family: str, build_model: Callable[..., Any], make_trainer: Callable[..., Any], whole_batch: Callable[..., Any]
) -> None:
    routes = {}
    for route in ("fused", "logits"):
        trainer = make_trainer(build_model(family), head_route=route, ref_model=build_model(family, seed=1))
        routes[route] = loss_and_gradients(trainer, whole_batch(trainer))
    torch.testing.assert_close(routes["fused"][0], routes["logits"][0], rtol=1e-5, atol=1e-7)
    assert_close(routes["fused"][1], routes["logits"][1], 1e-4)


def test_tied_embeddings_get_one_gradient(
    build_model: Callable[..., Any], make_trainer: Callable[..., Any], whole_batch: Callable[..., Any]
) -> None:
    trainer = make_trainer(build_model("llama-tied"), ref_model=build_model("llama-tied", seed=1))
    _, ours = loss_and_gradients(trainer, whole_batch(trainer))
    model = trainer.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in ours
    batch = whole_batch(trainer)
    in_prompts = batch["input_ids"][(batch["labels"] == -100) & (batch["attention_mask"] == 1)].unique()
    assert (ours["model.embed_tokens.weight"][in_prompts].abs().sum(1) > 0).all()  # as input
    assert (ours["model.embed_tokens.weight"].abs().sum(1) > 0).all()  # as output: every token is in the softmax


@pytest.mark.parametrize("mode", ["reweight", "dora", "dora_outside"])
@pytest.mark.parametrize("form", ["paper", "mixture", "official"])
def test_calibration_comes_from_probs(
    mode: str,
    form: str,
    build_model: Callable[..., Any],
    build_rows: Callable[..., Any],
    make_trainer: Callable[..., Any],
    whole_batch: Callable[..., Any],
) -> None:
    rows = build_rows(7, size=3, probs=lambda rng: rng.uniform(0.05, 0.95), scores=lambda rng: rng.gauss(0, 1))
    trainer = make_trainer(
        ref_model=build_model(seed=1), train_dataset=rows, mode=mode, calibration_form=form, loss_type="plackett_luce"
    )
    batch = whole_batch(trainer)
    h = density_ratio(torch.tensor([row["probs"] for row in rows], dtype=torch.float64), form).mean(1)
    torch.testing.assert_close(batch["calibration"].double(), h, rtol=1e-6, atol=0)
    losses = trainer.preference_output(trainer.model, batch).group_losses.double()
    expected = {
        "reweight": (h * losses).mean(),
        "dora": (h * losses).exp().mean().log(),
        "dora_outside": h.mean() * losses.exp().mean().log(),
    }
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected[mode].item(), rel=1e-5)


@pytest.mark.parametrize(("reduce", "column"), [("chosen", 0), ("min", None)])
def test_reduction_ranks_by_scores(
    reduce: str, column: int | None, build_rows: Callable[..., Any], make_trainer: Callable[..., Any]
) -> None:
    rows = build_rows(5, size=3, probs=lambda rng: rng.uniform(0.05, 0.95), scores=lambda rng: rng.random())
    trainer = make_trainer(train_dataset=rows, mode="dora", loss_type="plackett_luce", calibration_reduce=reduce)
    for row, value in zip(rows, trainer.train_dataset["calibration"], strict=True):
        h = density_ratio(torch.tensor([row["probs"]], dtype=torch.float64))[0].tolist()
        best = max(range(3), key=row["scores"].__getitem__)
        assert value == pytest.approx(h[best] if column == 0 else min(h))


def test_calibrated_mode_without_probs_says_what_to_do(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"train_dataset: mode='dora' .* 12 of 12 rows have no `probs`.*calibrate"):
        make_trainer(mode="dora")


def test_some_rows_without_probs_are_counted(build_rows: Callable[..., Any], make_trainer: Callable[..., Any]) -> None:
    rows = build_rows(6, probs=lambda rng: 0.5)
    del rows[2]["probs"]
    with pytest.raises(DataError, match="1 of 6 rows have no `probs`"):
        make_trainer(mode="dora", train_dataset=rows)


@pytest.mark.parametrize("source", ["canonical", "trl", "dora-authors", "tokenised", "file"])
def test_every_kind_of_rows_gives_the_same_loss(
    source: str,
    tmp_path: Path,
    build_model: Callable[..., Any],
    build_rows: Callable[..., Any],
    make_trainer: Callable[..., Any],
    whole_batch: Callable[..., Any],
) -> None:
    from datasets import Dataset

    rows = build_rows(6)
    canonical = make_trainer(ref_model=build_model(seed=1), train_dataset=rows)
    expected = canonical.compute_loss(canonical.model, whole_batch(canonical)).item()
    pairs = [{"prompt": r["prompt"], "chosen": r["responses"][0], "rejected": r["responses"][1]} for r in rows]
    scored = [{"query": r["prompt"], "responses": r["responses"], "scores": [1.0, 0.0]} for r in rows]
    if source == "file":
        Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    data = {
        "canonical": Dataset.from_list(rows),
        "trl": pairs,
        "dora-authors": scored,
        "tokenised": [*canonical.train_dataset],
        "file": tmp_path / "rows.jsonl",
    }[source]
    trainer = make_trainer(ref_model=build_model(seed=1), train_dataset=data)
    assert trainer.compute_loss(trainer.model, whole_batch(trainer)).item() == pytest.approx(expected, rel=1e-6)


def test_loss_without_a_reference(
    build_model: Callable[..., Any],
    make_trainer: Callable[..., Any],
    whole_batch: Callable[..., Any],
    response_logps: Callable[..., Tensor],
) -> None:
    trainer = make_trainer(build_model(), loss_type="simpo", mode="erm")
    assert trainer.reference is None
    batch = whole_batch(trainer)
    lengths = (batch["labels"] != -100).sum(1)
    means = (response_logps(build_model().double(), batch) / lengths).view(-1, 2)
    expected = -logsigmoid(2 * (means[:, 0] - means[:, 1]) - 0.5).mean()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_same_loss_and_gradients_as_trl(
    tmp_path: Path,
    build_model: Callable[..., Any],
    build_rows: Callable[..., Any],
    make_trainer: Callable[..., Any],
    whole_batch: Callable[..., Any],
    tokenizer: Any,
) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed, so there is nothing to compare with")
    from datasets import Dataset

    rows = build_rows(4)
    ours = make_trainer(build_model(), ref_model=build_model(seed=1), train_dataset=rows, mode="erm", beta=BETA)
    loss, gradient = loss_and_gradients(ours, whole_batch(ours))

    # TRL joins prompt and response as strings, and writes neither BOS nor the space between them.
    pairs = [
        {"prompt": r["prompt"] + " ", "chosen": r["responses"][0] + " ", "rejected": r["responses"][1] + " "}
        for r in rows
    ]
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=BETA, report_to="none", use_cpu=True, bf16=False, max_length=None
    )
    theirs = trl.DPOTrainer(
        build_model(),
        build_model(seed=1),
        config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    theirs.model.train()
    batch = theirs.data_collator([*theirs.train_dataset])
    ids = whole_batch(ours)
    rows_of = [ids["input_ids"][i][ids["attention_mask"][i] == 1].tolist() for i in [*range(0, 8, 2), *range(1, 8, 2)]]
    kept = [batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist() for i in range(8)]
    assert kept == rows_of, "the two tokenisations have to be the same for the comparison to mean anything"
    expected = theirs.compute_loss(theirs.model, batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_close(gradient, gradients(theirs.model), 1e-3)


def test_random_groups_of_any_size(
    build_model: Callable[..., Any],
    build_rows: Callable[..., Any],
    make_trainer: Callable[..., Any],
    whole_batch: Callable[..., Any],
    response_logps: Callable[..., Tensor],
) -> None:
    """Ragged K in one batch: each group's DPO-PL loss is the one it has alone."""
    rng = random.Random()
    sizes = [rng.randint(2, 5) for _ in range(6)]
    rows = [
        {**build_rows(1, size=size, seed=rng.randint(0, 10**6), scores=lambda r: r.random())[0], "id": str(index)}
        for index, size in enumerate(sizes)
    ]
    trainer = make_trainer(train_dataset=rows, ref_model=build_model(seed=1), loss_type="plackett_luce")
    output = trainer.preference_output(trainer.model, whole_batch(trainer))
    assert output.logps.shape == (sum(sizes),)
    for index in range(len(rows)):
        alone = trainer.preference_output(trainer.model, trainer.data_collator([trainer.train_dataset[index]]))
        assert alone.group_losses.item() == pytest.approx(output.group_losses[index].item(), rel=1e-4, abs=1e-6)
