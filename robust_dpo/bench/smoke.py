"""Every operator and kernel, forward and backward, at small and odd shapes: what a memory checker can watch.

    python -m robust_dpo.bench.smoke --device cuda

A memory checker makes every launch and allocation some fifty times slower, so each path is taken once or twice instead
of in all combinations: those are what the GPU tests are for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
from robust_dpo.dispatch import get_row_logprob

WIDTH, SEQUENCES, TOKENS, PROMPT = 32, 8, 9, 3
# Half of the 48 response rows: the second chunk adds to what the first has left.
HEAD_CHUNK_ROWS = 24
# Few rows and four segments of 16 KiB in each: several programs share a row. Odd, so that rows begin anywhere.
SPLIT_ROWS, SPLIT_VOCAB = 3, 40_009
# More rows than the last program of group_epilogue writes by itself (8,192).
MANY_TOKENS, MANY_VOCAB, MANY_WIDTH = 8200, 7, 8


@dataclass(frozen=True)
class HeadPath:
    """One way through `linear_preference_loss`; the vocabularies are below, at and above a block of the row kernel."""

    vocab: int
    dtype: torch.dtype
    group_size: int = 2
    robust: str | RobustObjective = "mean"
    softcap: float | None = None
    live: bool = False
    tile_dtype: torch.dtype | None = None


HEAD_PATHS = (
    HeadPath(31, torch.float32, 4, KLRobust(lam=1.0), softcap=5.0),
    HeadPath(5003, torch.float32, live=True),
    HeadPath(1024, torch.bfloat16, 2, KLRobust(lam=1.0), live=True),
    HeadPath(5003, torch.bfloat16, 4, tile_dtype=torch.float32),
    HeadPath(1024, torch.float16, 2, KLRobust(lam=1.0), softcap=5.0),
)


class Source:
    """Random tensors on a device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=self._generator, device=self.device).to(dtype)

    def targets(self, vocab: int, *size: int) -> Tensor:
        return torch.randint(vocab, size, generator=self._generator, device=self.device)


def run_head(device: torch.device, path: HeadPath, backend: str = "auto") -> None:
    """Padded sequences with prompts through the head, in several chunks."""
    source = Source(device, path.vocab)
    hidden = source.normal(SEQUENCES, TOKENS, WIDTH, dtype=path.dtype).requires_grad_()
    weight = source.normal(path.vocab, WIDTH, dtype=path.dtype).requires_grad_()
    bias = source.normal(path.vocab, dtype=path.dtype).requires_grad_()
    targets = source.targets(path.vocab, SEQUENCES, TOKENS)
    targets[:, :PROMPT] = IGNORE
    output = linear_preference_loss(
        hidden,
        weight,
        targets,
        group_size=path.group_size,
        bias=bias,
        ref_logps=None if path.live else source.normal(SEQUENCES),
        ref_hidden=hidden.detach().roll(1, 0) if path.live else None,
        ref_weight=weight.detach().roll(1, 0) if path.live else None,
        loss="sigmoid" if path.group_size == 2 else "plackett_luce",
        robust=path.robust,
        calibration=source.normal(SEQUENCES // path.group_size).abs(),
        softcap=path.softcap,
        chunk_bytes=HEAD_CHUNK_ROWS * path.vocab * (path.tile_dtype or path.dtype).itemsize,
        tile_dtype=path.tile_dtype,
        backend=backend,
    )
    output.loss.backward()
    require_finite(str(path), output.loss, hidden.grad, weight.grad, bias.grad)


def run_log_probs(device: torch.device, vocab: int, dtype: torch.dtype) -> None:
    """The differentiable routes, from hidden states and from logits, with a loss and weights around them."""
    source = Source(device, vocab)
    hidden = source.normal(4, TOKENS, WIDTH, dtype=dtype).requires_grad_()
    weight = source.normal(vocab, WIDTH, dtype=dtype).requires_grad_()
    logits = source.normal(4, TOKENS, vocab, dtype=dtype).requires_grad_()
    targets = source.targets(vocab, 4, TOKENS)
    targets[:, :PROMPT] = IGNORE
    logps, from_logits = sequence_logps(hidden, weight, targets), sequence_logps_from_logits(logits, targets)
    assert isinstance(logps, Tensor) and isinstance(from_logits, Tensor)
    h = calibration.density_ratio(source.normal(4).sigmoid(), "mixture")
    preference_loss(logps + from_logits, source.normal(4), calibration=h).loss.backward()
    require_finite(f"log-probs, V = {vocab}, {dtype}", hidden.grad, weight.grad, logits.grad)


def run_split_rows(device: torch.device, dtype: torch.dtype, backend: str = "auto", rows: int = SPLIT_ROWS) -> None:
    """Few long rows, with the gradient in their place and without."""
    source = Source(device, rows)
    tile, targets = source.normal(rows, SPLIT_VOCAB, dtype=dtype), source.targets(SPLIT_VOCAB, rows)
    launch = get_row_logprob(backend, device, dtype)
    require_finite(f"split rows, {dtype}", launch(tile, targets).logp)
    result = launch(tile, targets, grad_out=tile, entropy=True)
    require_finite(f"split rows, {dtype}, gradient", result.logp, result.entropy, tile)


def run_many_rows(device: torch.device, tokens: int = MANY_TOKENS, backend: str = "auto") -> None:
    """One pair with so many rows in a chunk that their coefficients take a launch of their own."""
    source = Source(device, tokens)
    hidden = source.normal(tokens, MANY_WIDTH).requires_grad_()
    output = linear_preference_loss(
        hidden,
        source.normal(MANY_VOCAB, MANY_WIDTH),
        source.targets(MANY_VOCAB, tokens),
        seq_lens=torch.tensor([tokens // 3, tokens - tokens // 3], device=device),
        ref_logps=source.normal(2),
        robust=KLRobust(lam=1.0),
        chunk_bytes=tokens * MANY_VOCAB * 4,
        backend=backend,
    )
    output.loss.backward()
    require_finite("many rows", output.loss, hidden.grad)


def require_finite(what: str, *results: Tensor | None) -> None:
    """Raises RuntimeError if a result is missing or has a number that is none."""
    if any(result is None or not bool(result.isfinite().all()) for result in results):
        raise RuntimeError(f"{what}: a result is missing or not finite")


def exercise(device: torch.device, paths: Sequence[HeadPath] = HEAD_PATHS) -> None:
    """Everything once; raises RuntimeError if a result is not finite."""
    for path in paths:
        run_head(device, path)
    run_log_probs(device, 1024, torch.bfloat16)
    run_log_probs(device, 31, torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        run_split_rows(device, dtype)
    run_many_rows(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    exercise(device)
    print(f"every operator ran on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
