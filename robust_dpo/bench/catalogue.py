"""The cases of the suite for each kind of device, most important first: what there is no time for is at the end."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from robust_dpo.bench.cases.base import Case
from robust_dpo.bench.cases.calibration import CalibrationCase
from robust_dpo.bench.cases.ceilings import CeilingCase, ProductCase
from robust_dpo.bench.cases.epilogue import EpilogueCase
from robust_dpo.bench.cases.head import HeadCase
from robust_dpo.bench.cases.logits import LogitsCase
from robust_dpo.bench.cases.row_kernel import RowCase
from robust_dpo.bench.cases.row_shapes import RowShapesCase
from robust_dpo.bench.problem import Shape

# Response rows in sequences of 512 tokens, so that N is S x 512. Prompt rows are left out, but in `PADDED`: whoever
# drops them before the head is not favoured.
LLAMA = Shape(vocab=128256, width=4096, sequences=16, tokens=512, prompt=0)
GEMMA = Shape(vocab=256000, width=2304, sequences=16, tokens=512, prompt=0)
QWEN = Shape(vocab=151936, width=896, sequences=32, tokens=512, prompt=0)
SMALL = Shape(vocab=32000, width=4096, sequences=8, tokens=512, prompt=0)
# Every response behind a prompt of its own length: rows are picked out of the hidden states, and gradients put back.
PADDED = replace(LLAMA, tokens=1024, prompt=512)
# For a CPU: a step of the products takes a tenth of a second on four cores.
LAPTOP = Shape(vocab=32768, width=512, sequences=8, tokens=64, prompt=0)
TINY = Shape(vocab=211, width=32, sequences=8, tokens=8, prompt=0)


def head_variants(shapes: tuple[Shape, ...], dtype: torch.dtype = torch.bfloat16) -> list[HeadCase]:
    """Pairs and lists of 4, head trained and frozen, cached and live reference: the nearest to plain DPO first."""
    found = [
        HeadCase(replace(shape, group_size=group_size), dtype, live, trained)
        for group_size, trained, shape, live in itertools.product((2, 4), (True, False), shapes, (False, True))
    ]
    return sorted(found, key=lambda case: (case.shape.group_size != 2) + (not case.train_head))


def gpu_cases() -> list[Case]:
    """Everything for a data-centre GPU."""
    first, *rest = shapes = (LLAMA, QWEN, GEMMA, SMALL)
    headline = [HeadCase(first), HeadCase(first, live=True)]
    wide_rows = [RowCase(2048, 128256), RowCase(2048, 128256, gradient=True)]
    others = [case for case in head_variants(shapes) if case not in headline]
    near = [case for case in others if case.train_head and case.shape.group_size == 2]
    far = [case for case in others if case not in near]
    vocabs = (151936, 256000, 32000)
    return [
        CeilingCase(1 << 30, 8192),
        *headline,
        *wide_rows,
        LogitsCase(2048, 128256, backward=True),
        EpilogueCase(),
        *near,
        HeadCase(PADDED),
        HeadCase(first, chunks=(1024, 2048, 4096, 8192)),
        ProductCase(first.width, first.vocab),
        *(RowCase(2048, vocab, gradient=gradient) for vocab in vocabs for gradient in (True, False)),
        # A chunk of the head, its fp32 tile, forward only, and few rows.
        RowShapesCase(2048, 128256, gradient=True),
        RowShapesCase(1024, 256000, gradient=True),
        RowShapesCase(1024, 128256, torch.float32, gradient=True),
        RowShapesCase(2048, 128256),
        RowShapesCase(64, 128256, gradient=True),
        LogitsCase(2048, 128256),
        CalibrationCase(),
        *far,
        *(ProductCase(shape.width, shape.vocab) for shape in rest),
        *(RowCase(2048, 128256, torch.float32, gradient) for gradient in (True, False)),
        replace(headline[0], compiled=True),
        replace(headline[1], compiled=True),
        LogitsCase(2048, 128256, backward=True, compiled=True),
    ]


def cpu_cases() -> list[Case]:
    """The same on a CPU, in minutes on four cores."""
    chunks = (64, 128, 256, 512)
    return [
        CeilingCase(1 << 28, 2048),
        HeadCase(LAPTOP, live=True),
        HeadCase(LAPTOP, torch.float32),
        RowCase(256, 128256, gradient=True),
        RowCase(256, 128256),
        LogitsCase(256, 128256, tokens=64, backward=True),
        EpilogueCase(),
        HeadCase(replace(LAPTOP, group_size=4)),
        HeadCase(LAPTOP, train_head=False),
        HeadCase(replace(LAPTOP, tokens=2 * LAPTOP.tokens, prompt=LAPTOP.tokens)),
        HeadCase(LAPTOP, chunks=chunks),
        ProductCase(LAPTOP.width, LAPTOP.vocab, chunks),
        CalibrationCase(),
        RowCase(256, 128256, torch.float32, gradient=True),
        LogitsCase(256, 128256, tokens=64),
        HeadCase(LAPTOP, live=True, compiled=True),
    ]


def quick_cases() -> list[Case]:
    """Every kind of case at sizes that take no time, to see that everything runs."""
    return [
        CeilingCase(1 << 20, 64),
        *head_variants((TINY,))[:4],
        HeadCase(replace(TINY, group_size=4), torch.float32, live=True, train_head=False),
        HeadCase(replace(TINY, prompt=4)),
        HeadCase(TINY, chunks=(8, 16, 64)),
        ProductCase(TINY.width, TINY.vocab, (16, 64)),
        RowCase(17, 1031, gradient=True),
        RowCase(17, 1031, torch.float32),
        LogitsCase(16, 1031, tokens=4, backward=True),
        LogitsCase(16, 1031, tokens=4),
        EpilogueCase(4, 32),
        CalibrationCase(1000),
    ]


def cases_for(device: torch.device, *, quick: bool) -> list[Case]:
    """All cases of a device, most important first."""
    if quick:
        return quick_cases()
    return gpu_cases() if device.type == "cuda" else cpu_cases()
