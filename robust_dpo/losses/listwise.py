"""Losses of a whole group of K responses. K is the group's own number of responses, not the padded width."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_dpo.checks import NON_NEGATIVE, POSITIVE
from robust_dpo.groups import Groups
from robust_dpo.losses.likelihood import sft
from robust_dpo.losses.pairs import ranked_pairs
from robust_dpo.losses.registry import register_loss


@register_loss("plackett_luce")
def plackett_luce(groups: Groups, *, beta: float = 0.1) -> Tensor:
    """DPO under Plackett-Luce: −(1/K) Σ_k log[ e^{t_k} / Σ_{j≥k} e^{t_j} ], t = βd, best first.

    Rafailov et al., arXiv 2305.18290, appendix A.3; the 1/K is that of DoRA (arXiv 2504.05831), so at K = 2
    this is half of `sigmoid`. Ties are ranked by position.
    """
    order = groups.order
    t = beta * groups.log_ratios.gather(1, order)
    mask = groups.mask.gather(1, order)
    width = t.shape[1]
    # Row k of [K, K] holds the responses still in the race. Its own slot stays, even a padded one: a row of
    # −inf alone would have NaN gradients.
    later = torch.ones(width, width, dtype=torch.bool, device=t.device).triu()
    itself = torch.eye(width, dtype=torch.bool, device=t.device)
    in_race = (later & mask[:, None, :]) | itself
    rest = t[:, None, :].expand(-1, width, -1).masked_fill(~in_race, float("-inf")).logsumexp(2)
    return (rest - t).masked_fill(~mask, 0.0).sum(1) / groups.mask.sum(1)


@register_loss("rrhf", needs_reference=False, length_penalty=NON_NEGATIVE, sft_weight=NON_NEGATIVE)
def rrhf(groups: Groups, *, length_penalty: float = 1.0, sft_weight: float = 0.0) -> Tensor:
    """RRHF (Yuan et al., arXiv 2304.05302): (1/K) Σ_{i worse than j} max(0, s_i − s_j), s = S/|y|^length_penalty.

    `sft_weight` times the token-mean negative log-likelihood of the best response is added; the RRHF paper
    takes 1, the default is the rank term alone.
    """
    pair = ranked_pairs(groups)
    chosen = pair.chosen.logps / pair.chosen.lengths**length_penalty
    rejected = pair.rejected.logps / pair.rejected.lengths**length_penalty
    rank = (rejected - chosen).relu().sum(1) / groups.mask.sum(1)
    return rank + sft_weight * sft(groups) if sft_weight > 0 else rank


@register_loss("lire", needs_reference=False, needs_scores=True, temperature=POSITIVE)
def lire(groups: Groups, *, temperature: float = 2.0) -> Tensor:
    """LIRE (Zhu et al., arXiv 2405.13516): −(1/K) Σ_i softmax(S/T)_i · softmax(scores)_i, T = `temperature`.

    Always negative. Needs the values of the scores.
    """
    assert groups.scores is not None
    absent = ~groups.mask
    policy = (groups.logps / temperature).masked_fill(absent, float("-inf")).softmax(1)
    reward = groups.scores.to(policy.dtype).masked_fill(absent, float("-inf")).softmax(1)
    return -(policy * reward).sum(1) / groups.mask.sum(1)
