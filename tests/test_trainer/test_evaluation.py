"""evaluate_ranking against log-probs from the model's own logits, for groups of more than two responses."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from robust_dpo.data import PreferenceCollator, load_preferences, tokenize_groups
from robust_dpo.evaluation import evaluate_ranking
from robust_dpo.trainer.router import plan_router_loss


@pytest.mark.parametrize("scored", [True, False], ids=["by score", "by position"])
@pytest.mark.parametrize("with_reference", [True, False], ids=["reference", "no reference"])
def test_accuracies_are_shares_of_the_rejected_responses(
    with_reference: bool, scored: bool, build_model: Any, build_rows: Any, tokenizer: Any, response_logps: Any
) -> None:
    columns = {"scores": lambda rng: rng.random()} if scored else {}
    rows = [*build_rows(10, size=4, **columns), *build_rows(9, size=3, seed=1, **columns)]
    for index, row in enumerate(rows):
        row["id"] = str(index)
    data = load_preferences(rows).dataset
    model, reference = build_model(seed=1), build_model(seed=2)

    result = evaluate_ranking(
        model, tokenizer, data, ref_model=reference if with_reference else None, beta=0.3, batch_size=4
    )

    tokenised = tokenize_groups(data, tokenizer, max_length=1024)
    batch = PreferenceCollator.for_tokenizer(tokenizer)([*tokenised])
    with torch.no_grad():
        logps = response_logps(model, batch)
        rewards = 0.3 * (logps - response_logps(reference, batch))
    lengths = (batch["labels"] != -100).sum(1)
    by_name = {"logp_accuracy": logps, "token_logp_accuracy": logps / lengths}
    if with_reference:
        by_name["accuracy"] = rewards
    sizes = batch["group_sizes"].tolist()
    for name, values in by_name.items():
        expected = []
        for row, group in zip(rows, values.split(sizes), strict=True):
            scores = row.get("scores", [-position for position in range(len(group))])
            best = scores.index(max(scores))
            beaten = [float(group[best] > value) for index, value in enumerate(group) if index != best]
            expected.append(sum(beaten) / len(beaten))
        assert result.per_group[name].tolist() == pytest.approx(expected), name
        assert getattr(result.overall, name) == pytest.approx(sum(expected) / len(expected)), name
    assert (result.overall.accuracy is None) == (not with_reference)


def test_the_load_of_experts_is_no_part_of_it(
    build_model: Any, build_rows: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a model's auxiliary loss is on, and none that could be trained with."""
    model = build_model("mixtral-experts", output_router_logits=True)
    data = load_preferences(build_rows(6)).dataset
    plain = evaluate_ranking(model, tokenizer, data, ref_model=build_model(seed=2))
    forward = model.forward

    @functools.wraps(forward)
    def doubled(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.aux_loss = None if output.aux_loss is None else 2 * output.aux_loss
        return output

    monkeypatch.setattr(model, "forward", doubled)
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected 0 for MixtralForCausalLM"):
        plan_router_loss(model, None, trial=True)
    assert evaluate_ranking(model, tokenizer, data, ref_model=build_model(seed=2)).overall == plain.overall
