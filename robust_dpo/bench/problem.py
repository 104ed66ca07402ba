"""The problem that every implementation of the LM head solves."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
# Rows of float32 softmax at a time while targets are drawn: 512 x 128,256 of them are 263 MB.
_DRAW_ROWS = 512


@dataclass(frozen=True)
class Shape:
    """Sizes of the problem.

    Args:
        vocab: V.
        width: H.
        sequences: S; responses of a group are adjacent, best first.
        tokens: positions of a sequence.
        prompt: positions in front of each response, which carry no target; None for half of them.
        group_size: K responses of a group.
    """

    vocab: int = 49152
    width: int = 576
    sequences: int = 8
    tokens: int = 1024
    prompt: int | None = None
    group_size: int = 2

    @property
    def prompt_tokens(self) -> int:
        return self.tokens // 2 if self.prompt is None else self.prompt

    @property
    def response_rows(self) -> int:
        """Rows that carry a target: N."""
        return self.sequences * (self.tokens - self.prompt_tokens)

    @property
    def product_flops(self) -> int:
        """FLOPs of one N·H·V matrix product over the response rows (a multiply and an add each)."""
        return 2 * self.response_rows * self.width * self.vocab


@dataclass(frozen=True)
class Problem:
    """A preference loss over an LM head: DPO on pairs, Plackett-Luce on longer lists.

    Args:
        hidden: [S, T, H] policy hidden states.
        weight: [V, H] policy head.
        targets: [S, T] int64, already shifted; -100 on the prompt.
        ref_hidden: [S, T, H] hidden states of a live reference, or None.
        ref_weight: [V, H] head of the live reference, or None.
        ref_logps: [S] fp32 cached log-probs of the reference, or None; one of the two references is there.
        beta: strength of the preference loss.
        group_size: responses of a group.
        train_head: whether the gradient of `weight` is asked for.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_logps: Tensor | None = None
    beta: float = 0.1
    group_size: int = 2
    train_head: bool = True

    @property
    def live_reference(self) -> bool:
        return self.ref_logps is None

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def input_bytes(self) -> int:
        """Bytes of all tensors of the problem."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

    @staticmethod
    def load(path: Path, *, mmap: bool) -> Problem:
        """Read a saved problem; with `mmap`, processes share the pages of the file instead of holding copies."""
        return Problem(**torch.load(path, mmap=mmap))

    def take(self, order: Tensor) -> Problem:
        """The same problem with its sequences in another order."""
        return replace(
            self,
            hidden=self.hidden[order],
            targets=self.targets[order],
            ref_hidden=None if self.ref_hidden is None else self.ref_hidden[order],
            ref_logps=None if self.ref_logps is None else self.ref_logps[order],
        )

    def with_cached_reference(self, ref_logps: Tensor) -> Problem:
        """The same problem with log-probs [S] in the place of the reference's hidden states and head."""
        return replace(self, ref_hidden=None, ref_weight=None, ref_logps=ref_logps.float())

    def loss(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """The loss [] of log-probs [S] of policy and reference, in plain PyTorch."""
        return group_loss(logps, ref_logps, self.beta, self.group_size)


def group_loss(logps: Tensor, ref_logps: Tensor, beta: float, group_size: int) -> Tensor:
    """Mean over groups of DPO (two responses) or Plackett-Luce (more), of logps and ref_logps [S], best first.

    DPO: -log sigmoid(beta (d_chosen - d_rejected)). Plackett-Luce (Rafailov et al., arXiv 2305.18290, appendix A.3)
    divided by K: -(1/K) sum_k [t_k - logsumexp_{j >= k} t_j], t = beta d.
    """
    t = beta * (logps - ref_logps).view(-1, group_size)
    if group_size == 2:
        return -F.logsigmoid(t[:, 0] - t[:, 1]).mean()
    still_there = t.flip(1).logcumsumexp(1).flip(1)
    return (still_there - t).mean(1).mean()


def make_problem(shape: Shape, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu") -> Problem:
    """Hidden states and heads as a language model has them, not flat noise, with a live reference.

    Rows of the head have norm 1 and a hidden state points at a handful of candidate tokens, low ids most often, so that
    a few logits stand out from a Gaussian background; targets are drawn from the resulting softmax. With the constants
    below the log-prob of a target is around -2.5 on average at the default sizes, with a long tail. The reference is
    the policy with noise on hidden states and head that puts the margins of the pairs near 1.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    rows = shape.sequences * shape.tokens
    weight = normal(shape.vocab, shape.width) / math.sqrt(shape.width)
    background, candidates = 2.0, 6
    # Level at which one candidate outweighs the whole background: the background's logsumexp is log V + variance / 2.
    level = math.log(shape.vocab) + background**2 / 2
    hidden = background * normal(rows, shape.width)
    confidence = normal(rows) - 0.9
    for _ in range(candidates):
        token = (shape.vocab * torch.rand(rows, generator=generator, device=device) ** 4).long()
        token.clamp_(max=shape.vocab - 1)
        strength = level + confidence + 1.5 * normal(rows)
        hidden += strength[:, None] * weight[token]
    ref_hidden = hidden + 0.3 * normal(rows, shape.width)

    targets = torch.full((shape.sequences, shape.tokens), IGNORE, device=device)
    responses = torch.zeros(targets.shape, dtype=torch.bool, device=device)
    responses[:, shape.prompt_tokens :] = True
    drawn = []
    for states in hidden[responses.flatten()].split(_DRAW_ROWS):
        distribution = torch.softmax(states @ weight.t(), dim=1).cumsum(1)
        uniform = torch.rand(len(states), 1, generator=generator, device=device) * distribution[:, -1:]
        drawn.append(torch.searchsorted(distribution, uniform)[:, 0].clamp(max=shape.vocab - 1))
    targets[responses] = torch.cat(drawn)

    noise = 0.1 / (background * math.sqrt(shape.width)) * weight.std()
    ref_weight = (weight + noise * normal(*weight.shape)).to(dtype)

    def batched(states: Tensor) -> Tensor:
        return states.view(shape.sequences, shape.tokens, shape.width).to(dtype)

    return Problem(
        batched(hidden),
        weight.to(dtype),
        targets,
        batched(ref_hidden),
        ref_weight,
        group_size=shape.group_size,
    )


def shape_dict(shape: Shape) -> dict[str, int]:
    return {**asdict(shape), "prompt": shape.prompt_tokens, "response_rows": shape.response_rows}
