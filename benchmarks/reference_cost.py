"""What a reference costs on this machine.

    python benchmarks/reference_cost.py

Live, inside the loss (ref_hidden, ref_weight) against a pass of its own (sequence_logps, no gradient): median time of
forward and backward through the head, interleaved, for each and for known log-probs. Then the rate at which weights are
hashed, which a cache of its log-probs is recognised by.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robust_dpo import linear_preference_loss, sequence_logps
from robust_dpo.reference_cache import weights_fingerprint

SHAPES = {"hidden 256, V 32000": (256, 32000), "hidden 576, V 49152": (576, 49152)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def routes(width: int, vocab: int, dtype: torch.dtype, rows: int, responses: int) -> dict[str, Callable[[], Tensor]]:
    """The three ways on one random problem; each returns the loss."""
    torch.manual_seed(0)
    hidden, ref_hidden = (torch.randn(rows, width).to(dtype) for _ in range(2))
    weight, ref_weight = ((torch.randn(vocab, width) / width**0.5).to(dtype) for _ in range(2))
    hidden.requires_grad_()
    weight.requires_grad_()
    targets, seq_lens = torch.randint(vocab, (rows,)), torch.full((responses,), rows // responses)

    def step(**reference: Any) -> Tensor:
        loss = linear_preference_loss(hidden, weight, targets, seq_lens=seq_lens, **reference).loss
        loss.backward()
        hidden.grad = weight.grad = None
        return loss.detach()

    def own_pass() -> Tensor:
        # Neither of its tensors asks for a gradient.
        return step(ref_logps=sequence_logps(ref_hidden, ref_weight, targets, seq_lens=seq_lens))

    known = torch.zeros(responses)
    return {
        "in the loss": lambda: step(ref_hidden=ref_hidden, ref_weight=ref_weight),
        "own pass": own_pass,
        "known": lambda: step(ref_logps=known),
    }


def print_hash_rate(megabytes: int, rounds: int) -> None:
    """Median rate of `weights_fingerprint`."""
    layers = {f"layer {index}": torch.randn(1 << 20) for index in range(megabytes // 4)}
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        weights_fingerprint(layers.items())
        times.append(time.perf_counter() - start)
    print(f"weights_fingerprint: {megabytes * 1.048576 / 1000 / statistics.median(times):.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=800, help="tokens of all responses")
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for shape, (width, vocab) in SHAPES.items():
        for name, dtype in DTYPES.items():
            ways = routes(width, vocab, dtype, options.rows, options.responses)
            torch.testing.assert_close(ways["in the loss"](), ways["own pass"](), rtol=1e-4, atol=1e-6)
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(options.rounds):
                for way, run in ways.items():
                    start = time.perf_counter()
                    run()
                    times[way].append(time.perf_counter() - start)
            medians = {way: statistics.median(values) for way, values in times.items()}
            shown = ", ".join(f"{way} {1000 * median:.0f} ms" for way, median in medians.items())
            ratio = medians["in the loss"] / medians["own pass"]
            print(f"{shape}, {name}: {shown}; in the loss / own pass {ratio:.3f}", flush=True)
    print_hash_rate(512, options.rounds)


if __name__ == "__main__":
    main()
