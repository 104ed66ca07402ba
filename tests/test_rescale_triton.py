"""The conditional multiplication in Triton: through the interpreter where there is no GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from robust_dpo.kernels.rescale_triton import BLOCK_BYTES, rescale

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = BLOCK_BYTES // 4


@pytest.mark.parametrize("count", [0, 1, 31, BLOCK - 1, BLOCK, BLOCK + 1, 9 * BLOCK + 5, 1_000_001])
@pytest.mark.parametrize("factor", [0.0, 0.25, math.exp(-31.0), 1e10], ids=str)
def test_multiplies_every_element(factor: float, count: int) -> None:
    total = torch.randn(count, device=DEVICE)
    expected = total * factor
    rescale(total, torch.tensor(factor, dtype=torch.float64, device=DEVICE))
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_shape_dtype_and_alignment(dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    memory = torch.randn(1 + 3 * 5 * 700 + 1, dtype=dtype, device=DEVICE)
    before = memory.clone()
    total = memory[1:-1].view(3, 5, 700)  # 4 or 8 bytes behind a multiple of 16
    rescale(total, torch.full((1,), 0.5, dtype=factor_dtype, device=DEVICE))
    assert torch.equal(total, before[1:-1].view(3, 5, 700) * 0.5)
    assert memory[0] == before[0] and memory[-1] == before[-1], "nothing beside it is touched"


def test_exactly_one_changes_no_bit() -> None:
    total = torch.tensor([math.nan, -0.0, math.inf, 1e-45, 3.0], device=DEVICE)
    before = total.view(torch.int32).clone()
    rescale(total, torch.ones((), dtype=torch.float64, device=DEVICE))
    assert torch.equal(total.view(torch.int32), before)


def test_a_factor_that_is_not_a_number_shows() -> None:
    total = torch.ones(3, device=DEVICE)
    rescale(total, torch.tensor(math.nan, dtype=torch.float64, device=DEVICE))
    assert total.isnan().all()


ONE = torch.ones((), device=DEVICE)
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "integers": (torch.ones(2, dtype=torch.int64), ONE, r"total: expected dtype float32 or float64, got torch.int64"),
    "half": (torch.ones(2, dtype=torch.bfloat16), ONE, r"total: expected dtype float32 or float64, got torch.bfloat16"),
    "strided": (torch.ones(2, 2).T[:1], ONE, r"total: expected a contiguous tensor, got strides \(1, 2\)"),
    "factors": (torch.ones(2), torch.ones(2), r"factor: expected one number .*, got \[2\] of torch.float32"),
    "whole-factor": (torch.ones(2), torch.tensor(1), r"factor: expected one number .*, got \[\] of torch.int64"),
    "elsewhere": (torch.ones(2, device="meta"), ONE, r"factor: expected a tensor on meta, as total, got"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message(case: str) -> None:
    total, factor, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        rescale(total, factor)
