"""Every operator once, forward and backward, at small and odd shapes: what a memory checker can watch.

python -m robust_dpo.bench.smoke --device cuda
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from robust_dpo import (
    KLRobust,
    RobustObjective,
    calibration,
    linear_preference_loss,
    preference_loss,
    sequence_logps,
    sequence_logps_from_logits,
)
from robust_dpo.bench.problem import IGNORE

# Odd vocabularies: below, at and above a block of the row kernel, and not a multiple of 16 bytes.
VOCABS = (31, 1024, 5003)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH, SEQUENCES, TOKENS = 32, 8, 9


def exercise(device: torch.device, vocab: int, dtype: torch.dtype, group_size: int) -> None:
    """One problem through every operator; raises if a result is not finite."""
    generator = torch.Generator(device).manual_seed(vocab)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    hidden = normal(SEQUENCES, TOKENS, WIDTH).requires_grad_()
    weight, bias = normal(vocab, WIDTH).requires_grad_(), normal(vocab).requires_grad_()
    targets = torch.randint(vocab, (SEQUENCES, TOKENS), generator=generator, device=device)
    targets[:, :3] = IGNORE
    h = calibration.density_ratio(torch.rand(SEQUENCES, generator=generator, device=device), "mixture")
    name = "sigmoid" if group_size == 2 else "plackett_luce"
    objectives: tuple[str | RobustObjective, ...] = ("mean", KLRobust(lam=1.0))
    for robust, softcap in itertools.product(objectives, (None, 5.0)):
        output = linear_preference_loss(
            hidden,
            weight,
            targets,
            group_size=group_size,
            bias=bias,
            ref_hidden=normal(SEQUENCES, TOKENS, WIDTH),
            ref_weight=normal(vocab, WIDTH),
            loss=name,
            robust=robust,
            calibration=h,
            softcap=softcap,
            chunk_bytes=16 * vocab * 4,
        )
        output.loss.backward()
    logps = sequence_logps(hidden, weight, targets, bias=bias)
    from_logits = sequence_logps_from_logits(normal(SEQUENCES, TOKENS, vocab).requires_grad_(), targets)
    assert isinstance(logps, torch.Tensor) and isinstance(from_logits, torch.Tensor)
    preference_loss(logps, from_logits.detach(), group_size=group_size, loss=name, calibration=h).loss.backward()
    from_logits.sum().backward()
    for result in (hidden.grad, weight.grad, bias.grad):
        if result is None or not result.isfinite().all():
            raise RuntimeError(f"no finite gradient at V = {vocab}, {dtype}, groups of {group_size}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    for vocab, dtype, group_size in itertools.product(VOCABS, DTYPES, (2, 4)):
        exercise(device, vocab, dtype, group_size)
    print(f"every operator ran on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
