"""Attention of packed groups, forward and backward: every backend that runs here, in turns, against padded rows.

    python benchmarks/layout_attention.py --groups 4 --responses 2 --heads 9 --kv-heads 3 --threads 2

One layer of attention over groups whose lengths are like those of short dialogues. Prints a Markdown table; times are
medians of a run, `× first` is the median of the ratios of each round.
"""

from __future__ import annotations

import argparse
import random
import statistics

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from robust_dpo.bench.timing import Run, Stopwatch, in_turns
from robust_dpo.layout import AttentionBackend, Group, PackedGroups, pack_groups, usable_backends

WIDTH = 64
"""D, the width of a head."""
DEFAULTS = {
    "groups": 4,
    "responses": 2,
    "max-length": 512,
    "heads": 9,
    "kv-heads": 3,
    "threads": 2,
    "rounds": 15,
    "seed": 0,
}


def draw_groups(count: int, responses: int, most: int, rng: random.Random) -> list[Group]:
    """Groups with lognormal lengths, medians 96 and 28."""

    def tokens(median: float, spread: float) -> list[int]:
        return [0] * min(max(1, round(median * rng.lognormvariate(0.0, spread))), most // 2)

    return [Group(tokens(96, 0.75), [tokens(28, 0.95) for _ in range(responses)]) for _ in range(count)]


def packed_run(backend: AttentionBackend, packed: PackedGroups, heads: int, kv_heads: int) -> Run:
    """Prepares the mask, attends and goes back, as in a model of one layer."""
    rows, width = packed.input_ids.shape
    inputs = _projections(rows, width, heads, kv_heads, packed.input_ids.device)

    def call() -> object:
        mask = backend.prepare(packed, causal_mask_function, torch.float32)
        out, _ = backend.attend(nn.Module(), *inputs, mask)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return Run(call)


def padded_run(groups: list[Group], heads: int, kv_heads: int, device: torch.device) -> Run:
    """Every response behind its own copy of the prompt, padded to the longest, plain causal attention."""
    lengths = [len(group.prompt) + len(response) for group in groups for response in group.responses]
    inputs = _projections(len(lengths), max(lengths), heads, kv_heads, device)

    def call() -> object:
        out = nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=heads > kv_heads)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return Run(call)


def _projections(rows: int, width: int, heads: int, kv_heads: int, device: torch.device) -> list[Tensor]:
    return [
        torch.randn(rows, width, count, WIDTH, device=device).transpose(1, 2).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="default cpu")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    groups = draw_groups(args.groups, args.responses, args.max_length, random.Random(args.seed))
    runs = {}
    for backend in usable_backends(device):
        for tokens in dict.fromkeys((None, backend.row_tokens)):
            packed = pack_groups(groups, row_tokens=tokens).to(device)
            shape = "×".join(str(size) for size in packed.input_ids.shape)
            runs[f"{backend.name}, rows {shape}"] = packed_run(backend, packed, args.heads, args.kv_heads)
    runs["padded"] = padded_run(groups, args.heads, args.kv_heads, device)
    seconds = in_turns(runs, Stopwatch(device), rounds=args.rounds)
    first = next(iter(seconds))
    print(f"{args.groups} groups of {args.responses}, {args.heads}/{args.kv_heads} heads, {args.threads} threads\n")
    print("| layout | ms | × first |\n|---|---|---|")
    for name, times in seconds.items():
        ratio = statistics.median(mine / its for mine, its in zip(times, seconds[first], strict=True))
        print(f"| {name} | {1e3 * statistics.median(times):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
