"""The exact solution of a problem, computed without any implementation under test, and how far a result is from it.

Nothing of size N×V is ever held: the vocabulary goes by in slabs. Where even the whole gradient is too much work or
memory (V = 128,256 on a GPU), the gradient is exact on a random subset of its rows, and of the head's tokens; every row
of the batch takes part in the loss and in each entry of the head's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from robust_dpo.bench.problem import IGNORE, Problem

Objective = Literal["preference", "cross_entropy"]
# A slab of logits of this many bytes: large enough for the matrix products, small beside the problem.
_SLAB_BYTES = {"cpu": 64 << 20}
_SLAB_BYTES_ELSEWHERE = 1 << 30


@dataclass(frozen=True)
class TokenLogps:
    """Log-probs of the N response rows.

    Args:
        logp: [N] of each target.
        lse: [N] log-sum-exp of the logits.
        ref_logp: [N] under the live reference.
        sequence: [N] int64, the sequence of each row.
        sequences: S.
    """

    logp: Tensor
    lse: Tensor
    ref_logp: Tensor
    sequence: Tensor
    sequences: int

    def per_sequence(self, values: Tensor) -> Tensor:
        """[N] → [S], sums."""
        return values.new_zeros(self.sequences).index_add(0, self.sequence, values)


@dataclass(frozen=True)
class Solution:
    """Exact results, and which part of the gradients they cover.

    Args:
        loss: [].
        logps: [S].
        ref_logps: [S].
        rows: [r] int64, positions in the flattened [S·T] hidden states, that `dhidden` is of.
        dhidden: [r, H].
        tokens: [c] int64, rows of the head that `dweight` is of.
        dweight: [c, H].
    """

    loss: Tensor
    logps: Tensor
    ref_logps: Tensor
    rows: Tensor
    dhidden: Tensor
    tokens: Tensor
    dweight: Tensor

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

    @staticmethod
    def load(path: Path) -> Solution:
        return Solution(**torch.load(path, mmap=True))

    def errors(self, loss: Tensor, dhidden: Tensor, dweight: Tensor | None) -> dict[str, float]:
        """Relative errors of a loss [] and of gradients [S, T, H] and [V, H] (None: not asked for)."""
        found = {
            "loss": relative_error(loss, self.loss),
            "dhidden": relative_error(dhidden.flatten(0, 1)[self.rows], self.dhidden),
        }
        if dweight is not None:
            found["dweight"] = relative_error(dweight[self.tokens], self.dweight)
        return found


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, but float32 on GPUs that have next to no float64 units.

    Products of bf16 numbers are exact in float32, and sums of 4,096 of them good to 1e-6: four digits better than
    what is checked.
    """
    if device.type != "cuda":
        return torch.float64
    properties = torch.cuda.get_device_properties(device)
    # Compute capability 8.0, 9.0 and 10.0 are the data-centre parts; 8.6, 8.9 and 12.0 run float64 at 1/64 of float32.
    data_centre = torch.version.hip is not None or (properties.minor == 0 and properties.major < 12)
    return torch.float64 if data_centre else torch.float32


def _slabs(vocab: int, states: Tensor) -> Iterator[slice]:
    """Parts of a vocabulary whose logits of `states` [n, H], and whose rows of the head, fit into the budget."""
    budget = _SLAB_BYTES.get(states.device.type, _SLAB_BYTES_ELSEWHERE)
    size = max(1, budget // (max(*states.shape, 1) * states.element_size()))
    return (slice(start, start + size) for start in range(0, vocab, size))


def _row_logps(states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and log-sum-exp [N] of rows [N, H], in the dtype of `states`."""
    lse = torch.full_like(states[:, 0], float("-inf"))
    for slab in _slabs(len(weight), states):
        lse = torch.logaddexp(lse, (states @ weight[slab].to(states.dtype).t()).logsumexp(1))
    logits = torch.cat(
        [
            (rows * weight[index].to(rows.dtype)).sum(1)
            for rows, index in zip(states.split(4096), targets.split(4096), strict=True)
        ]
    )
    return logits - lse, lse


def token_logps(problem: Problem, dtype: torch.dtype = torch.float64) -> TokenLogps:
    """Log-probs of a problem with a live reference, in `dtype` on exactly the given inputs; the costly part."""
    if problem.ref_hidden is None or problem.ref_weight is None:
        raise ValueError("problem: expected a live reference, got cached log-probs")
    mask = problem.targets != IGNORE
    targets = problem.targets[mask]
    logp, lse = _row_logps(problem.hidden[mask].to(dtype), problem.weight, targets)
    ref_logp, _ = _row_logps(problem.ref_hidden[mask].to(dtype), problem.ref_weight, targets)
    return TokenLogps(logp, lse, ref_logp, mask.nonzero()[:, 0], len(problem.targets))


def _row_gradient(problem: Problem, tokens: TokenLogps, objective: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], logps [S], ref_logps [S], dloss/dtoken logp [N]) of the policy's log-probs."""
    logps = tokens.per_sequence(tokens.logp)
    ref_logps = tokens.per_sequence(tokens.ref_logp) if problem.live_reference else problem.ref_logps
    assert ref_logps is not None
    ref_logps = ref_logps.to(logps.dtype)
    if objective == "cross_entropy":
        count = len(tokens.logp)
        return -tokens.logp.mean(), logps, ref_logps, torch.full_like(tokens.logp, -1 / count)
    leaf = logps.clone().requires_grad_()
    loss = problem.loss(leaf, ref_logps)
    (dlogps,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), logps, ref_logps, dlogps[tokens.sequence]


def solve(
    problem: Problem,
    tokens: TokenLogps | None = None,
    *,
    objective: Objective = "preference",
    max_rows: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Solution:
    """Loss and gradients in the dtype of `tokens` (float64 where they are computed here).

    Args:
        problem: what to solve.
        tokens: its log-probs, where they are known; a problem with a cached reference needs them.
        objective: the problem's own loss, or the mean cross-entropy of the targets.
        max_rows: rows of dhidden, drawn at random among the response rows; None for every position.
        max_tokens: rows of dweight, half of them among the targets; None for the whole head.
        seed: of the draws.
    """
    tokens = token_logps(problem) if tokens is None else tokens
    loss, logps, ref_logps, coefficient = _row_gradient(problem, tokens, objective)
    mask = problem.targets != IGNORE
    targets, dtype = problem.targets[mask], tokens.logp.dtype
    generator = torch.Generator(targets.device).manual_seed(seed)

    def draw(candidates: Tensor, count: int) -> Tensor:
        order = torch.randperm(len(candidates), generator=generator, device=targets.device)
        return candidates[order[:count]]

    picked = torch.arange(len(targets), device=targets.device)
    if max_rows is not None:
        picked = draw(picked, max_rows)
    columns = torch.arange(len(problem.weight), device=targets.device)
    if max_tokens is not None and max_tokens < len(columns):
        columns = torch.cat([draw(targets.unique(), max_tokens // 2), draw(columns, max_tokens // 2)]).unique()

    states = problem.hidden[mask]
    # d loss / d hidden = a (W[target] − Σ p W): the sum over the vocabulary in slabs.
    chosen = states[picked].to(dtype)
    drows = problem.weight[targets[picked]].to(dtype)
    for slab in _slabs(len(problem.weight), chosen):
        head = problem.weight[slab].to(dtype)
        drows -= (chosen @ head.t() - tokens.lse[picked, None]).exp_() @ head
    drows *= coefficient[picked, None]
    flat = mask.flatten().nonzero()[:, 0][picked]
    if max_rows is None:  # every position: prompt rows have no gradient
        dhidden = drows.new_zeros(mask.numel(), drows.shape[1])
        dhidden[flat] = drows
        drows, flat = dhidden, torch.arange(mask.numel(), device=flat.device)

    # d loss / d W[v] = Σ_rows a (onehot − p)[v] x: every row takes part.
    wide = states.to(dtype)
    weighted = wide * coefficient[:, None]
    parts = []
    for slab in _slabs(len(columns), wide):
        part = columns[slab]
        z = (targets[:, None] == part).to(dtype)
        z -= (wide @ problem.weight[part].to(dtype).t() - tokens.lse[:, None]).exp_()
        parts.append(z.t() @ weighted)
    return Solution(loss, logps, ref_logps, flat, drows, columns, torch.cat(parts))


def relative_error(got: Tensor, exact: Tensor) -> float:
    """‖got - exact‖ / ‖exact‖ (L2), in float64, a block of rows at a time; 0 where both are 0."""
    got, exact = torch.atleast_2d(got), torch.atleast_2d(exact)
    squares = [
        [(a.double() - b.double()).square().sum().item(), b.double().square().sum().item()]
        for a, b in zip(got.split(4096), exact.split(4096), strict=True)
    ]
    difference, total = (sum(column) for column in zip(*squares, strict=True))
    if total == 0:
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / total)


def describe(problem: Problem, solution: Solution) -> dict[str, object]:
    """What the data look like: mean target log-prob, and the rewards β·(log-ratio) of the responses of each group."""
    log_ratios = (solution.logps - solution.ref_logps).view(-1, problem.group_size)
    tokens = (problem.targets != IGNORE).sum().item()
    return {
        "token_logp_mean": solution.logps.sum().item() / tokens,
        "rewards": (problem.beta * log_ratios).tolist(),
        "loss": solution.loss.item(),
    }
