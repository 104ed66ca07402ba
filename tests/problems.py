"""Random problems for the operators, and how far a result is from a reference."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from robust_dpo import backends


@dataclass
class Problem:
    """Ragged responses with prompts in front: `args` are the positional arguments, `kwargs` the others."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Problem:
        """A copy in another dtype, as leaves with gradient for hidden, weight and bias."""

        def cast(value: Any) -> Any:
            return (
                value.detach().to(dtype).clone() if isinstance(value, Tensor) and value.is_floating_point() else value
            )

        copy = Problem(cast(self.hidden), cast(self.weight), self.targets, {k: cast(v) for k, v in self.kwargs.items()})
        for leaf in copy.leaves.values():
            leaf.requires_grad_()
        return copy

    @property
    def leaves(self) -> dict[str, Tensor]:
        leaves = {"hidden": self.hidden, "weight": self.weight, "bias": self.kwargs.get("bias")}
        return {name: leaf for name, leaf in leaves.items() if leaf is not None}

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.targets


def make_problem(
    group_sizes: list[int],
    *,
    vocab: int = 37,
    width: int = 8,
    longest: int = 9,
    packed: bool = False,
    bias: bool = False,
    reference: str = "live",
    scores: bool = False,
    calibration: bool = False,
    seed: int | None = None,
) -> Problem:
    """A float64 problem whose log-probs look like a language model's: the target's logit stands out."""
    generator = torch.Generator()
    generator.manual_seed(torch.seed() if seed is None else seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = sum(group_sizes)
    prompts = torch.randint(0, 4, (count,), generator=generator)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    weight = normal(vocab, width) / width**0.5 * 2
    total = int((prompts + lengths).max())
    targets = torch.full((count, total), -100)
    for row, (prompt, length) in enumerate(zip(prompts.tolist(), lengths.tolist(), strict=True)):
        targets[row, prompt : prompt + length] = torch.randint(0, vocab, (length,), generator=generator)
    hidden = normal(count, total, width) + weight[targets.clamp(min=0)]
    ref_hidden = hidden + 0.3 * normal(count, total, width)
    kwargs: dict[str, Any] = {"group_sizes": torch.tensor(group_sizes)}
    if packed:
        kept = [slice(0, int(p + n)) for p, n in zip(prompts, lengths, strict=True)]
        kwargs["seq_lens"] = prompts + lengths
        hidden, targets, ref_hidden = (
            torch.cat([rows[part] for rows, part in zip(tensor, kept, strict=True)])
            for tensor in (hidden, targets, ref_hidden)
        )
    if bias:
        kwargs["bias"] = normal(vocab)
    if reference == "live":
        kwargs["ref_hidden"], kwargs["ref_weight"] = ref_hidden, weight + 0.1 * normal(vocab, width)
    elif reference == "cached":
        kwargs["ref_logps"] = -lengths - normal(count).abs()
    if scores:
        kwargs["scores"] = normal(count)
    if calibration:
        kwargs["calibration"] = normal(len(group_sizes)).abs()
    return Problem(hidden, weight, targets, kwargs)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖, in float64; absolute where the reference is zero."""
    value, reference = value.detach().double(), reference.detach().double()
    difference = (value - reference).norm()
    scale = reference.norm()
    return float(difference if scale == 0 else difference / scale)


def require_backend(name: str) -> None:
    """Skip without the backend, or fail where continuous integration says that everything must be there."""
    if name == "auto" or backends()[name].usable:
        return
    reason = f"backend {name} is not usable here: {backends()[name].detail}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
