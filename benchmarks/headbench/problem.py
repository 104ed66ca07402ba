"""The problem that every implementation solves, and its float64 solution."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Shape:
    """Sizes of the problem; sequences 2i and 2i + 1 are the chosen and the rejected response of pair i."""

    vocab: int = 49152
    width: int = 576
    sequences: int = 8
    tokens: int = 1024

    @property
    def response_rows(self) -> int:
        """Rows that carry a target: the second half of every sequence."""
        return self.sequences * (self.tokens - self.tokens // 2)

    @property
    def product_flops(self) -> int:
        """FLOPs of one N·H·V matrix product over the response rows (a multiply and an add each)."""
        return 2 * self.response_rows * self.width * self.vocab


@dataclass(frozen=True)
class Problem:
    """DPO over an LM head with a live reference.

    Args:
        hidden: [S, T, H] policy hidden states.
        weight: [V, H] policy head.
        ref_hidden: [S, T, H] hidden states of the reference.
        ref_weight: [V, H] head of the reference.
        targets: [S, T] int64, already shifted; -100 on the prompt.
        beta: strength of the preference loss.
    """

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    targets: Tensor
    beta: float = 0.1

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

    @staticmethod
    def load(path: Path, *, mmap: bool) -> Problem:
        """Read a saved problem; with `mmap`, processes share the pages of the file instead of holding copies."""
        return Problem(**torch.load(path, mmap=mmap))

    def take(self, order: Tensor) -> Problem:
        """The same problem with its sequences in another order."""
        return Problem(
            self.hidden[order],
            self.weight,
            self.ref_hidden[order],
            self.ref_weight,
            self.targets[order],
            self.beta,
        )


@dataclass(frozen=True)
class Solution:
    """Float64 solution: loss [], logps [S], ref_logps [S], dhidden [S, T, H], dweight [V, H]."""

    loss: Tensor
    logps: Tensor
    ref_logps: Tensor
    dhidden: Tensor
    dweight: Tensor

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

    @staticmethod
    def load(path: Path) -> Solution:
        return Solution(**torch.load(path, mmap=True))


def make_problem(shape: Shape, dtype: torch.dtype, seed: int) -> Problem:
    """Hidden states and heads as a language model has them, not flat noise.

    Rows of the head have norm 1 and a hidden state points at a handful of candidate tokens, low ids most often, so that
    a few logits stand out from a Gaussian background; targets are drawn from the resulting softmax. With the constants
    below the log-prob of a target is around -2.5 on average at the default sizes, with a long tail. The reference is
    the policy with noise on hidden states and head that puts the margins of the pairs near 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    rows = shape.sequences * shape.tokens
    weight = normal(shape.vocab, shape.width) / math.sqrt(shape.width)
    background, candidates = 2.0, 6
    # Level at which one candidate outweighs the whole background: the background's logsumexp is log V + variance / 2.
    level = math.log(shape.vocab) + background**2 / 2
    hidden = background * normal(rows, shape.width)
    confidence = normal(rows) - 0.9
    for _ in range(candidates):
        token = (shape.vocab * torch.rand(rows, generator=generator) ** 4).long()
        strength = level + confidence + 1.5 * normal(rows)
        hidden += strength[:, None] * weight[token]
    ref_hidden = hidden + 0.3 * normal(rows, shape.width)
    ref_weight = weight + 0.1 / (background * math.sqrt(shape.width)) * weight.std() * normal(*weight.shape)

    targets = torch.full((shape.sequences, shape.tokens), IGNORE)
    responses = torch.zeros(targets.shape, dtype=torch.bool)
    responses[:, shape.tokens // 2 :] = True
    drawn = []
    for states in hidden[responses.flatten()].split(512):
        distribution = torch.softmax(states @ weight.t(), dim=1).cumsum(1)
        uniform = torch.rand(len(states), 1, generator=generator) * distribution[:, -1:]
        drawn.append(torch.searchsorted(distribution, uniform)[:, 0].clamp(max=shape.vocab - 1))
    targets[responses] = torch.cat(drawn)

    def batched(states: Tensor) -> Tensor:
        return states.view(shape.sequences, shape.tokens, shape.width).to(dtype)

    return Problem(batched(hidden), weight.to(dtype), batched(ref_hidden), ref_weight.to(dtype), targets)


def dpo_loss(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Mean of -log sigmoid(beta (d_chosen - d_rejected)) over pairs; logps and ref_logps are [S], pairs adjacent."""
    log_ratios = (logps - ref_logps).view(-1, 2)
    return -F.logsigmoid(beta * (log_ratios[:, 0] - log_ratios[:, 1])).mean()


def solve(problem: Problem, chunk_rows: int = 256) -> Solution:
    """The problem in float64 on exactly the given inputs, in chunks of rows: independent of every implementation."""
    mask = problem.targets != IGNORE
    sequence = mask.nonzero()[:, 0]
    targets = problem.targets[mask]
    weight, ref_weight = problem.weight.double(), problem.ref_weight.double()
    hidden, ref_hidden = problem.hidden[mask].double(), problem.ref_hidden[mask].double()
    chunks = [slice(start, start + chunk_rows) for start in range(0, len(targets), chunk_rows)]

    def token_logps(states: Tensor, head: Tensor) -> Tensor:
        parts = []
        for part in chunks:
            logits = states[part] @ head.t()
            parts.append(logits.gather(1, targets[part, None])[:, 0] - logits.logsumexp(1))
        return torch.cat(parts)

    def per_sequence(values: Tensor) -> Tensor:
        return values.new_zeros(len(problem.targets)).index_add(0, sequence, values)

    logps = per_sequence(token_logps(hidden, weight)).requires_grad_()
    ref_logps = per_sequence(token_logps(ref_hidden, ref_weight))
    loss = dpo_loss(logps, ref_logps, problem.beta)
    (dlogps,) = torch.autograd.grad(loss, logps)

    dhidden = torch.zeros(problem.hidden.shape, dtype=torch.float64)
    drows, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
    for part in chunks:
        dlogits = torch.softmax(hidden[part] @ weight.t(), dim=1).neg_()
        dlogits[torch.arange(len(dlogits)), targets[part]] += 1
        dlogits *= dlogps[sequence[part], None]
        drows[part] = dlogits @ weight
        dweight.addmm_(dlogits.t(), hidden[part])
    dhidden[mask] = drows
    return Solution(loss.detach(), logps.detach(), ref_logps, dhidden, dweight)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """‖got - exact‖ / ‖exact‖ (L2), in float64, a block of rows at a time."""
    got, exact = torch.atleast_2d(got), torch.atleast_2d(exact)
    squares = [
        [(a.double() - b).square().sum().item(), b.square().sum().item()]
        for a, b in zip(got.split(4096), exact.split(4096), strict=True)
    ]
    difference, total = (sum(column) for column in zip(*squares, strict=True))
    return math.sqrt(difference / total)


def describe(problem: Problem, solution: Solution) -> dict[str, object]:
    """What the data look like: mean target log-prob and the margins of the pairs."""
    log_ratios = (solution.logps - solution.ref_logps).view(-1, 2)
    tokens = (problem.targets != IGNORE).sum().item()
    return {
        "token_logp_mean": solution.logps.sum().item() / tokens,
        "margins": (problem.beta * (log_ratios[:, 0] - log_ratios[:, 1])).tolist(),
        "loss": solution.loss.item(),
    }


def shape_dict(shape: Shape) -> dict[str, int]:
    return {**asdict(shape), "response_rows": shape.response_rows}
