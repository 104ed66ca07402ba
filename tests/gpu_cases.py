"""What the GPU tests share: the device, problems on it, and how far from float64 a result may be.

ROBUST_DPO_TEST_DEVICE=cpu runs on the CPU what is not about CUDA itself: a check of these tests.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from problems import Problem, make_problem, relative_error
from torch import Tensor

from robust_dpo import KLRobust, linear_preference_loss, reference

DEVICE = torch.device(os.environ.get("ROBUST_DPO_TEST_DEVICE", "cuda"))
on_the_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"),
]
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="about CUDA itself")
BACKENDS = ["torch", "triton", "cuda", "auto"] if DEVICE.type == "cuda" else ["torch", "auto"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of a sum of a few hundred products, its rounding to the dtype, and of a tile in that dtype before the softmax.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
KL = KLRobust(lam=0.5)


def tokens(group_sizes: list[int], dtype: torch.dtype, **options: Any) -> Problem:
    """A problem on the CPU with a vocabulary that is a multiple of nothing."""
    return make_problem(group_sizes, vocab=1009, width=64, longest=40, **options).to(dtype)


def there(problem: Problem) -> Problem:
    """A copy on the device; numbers of rows and responses stay on the host, where they need not be waited for."""
    kwargs = {
        name: value if name in ("seq_lens", "group_sizes") else value.detach().to(DEVICE, copy=True)
        for name, value in problem.kwargs.items()
    }
    hidden, weight, targets = (each.detach().to(DEVICE, copy=True) for each in problem.args)
    copy = Problem(hidden, weight, targets, kwargs)
    for leaf in copy.leaves.values():
        leaf.requires_grad_()
    return copy


def solve(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """Loss and gradients."""
    output = linear_preference_loss(*problem.args, **problem.kwargs, robust=KL, **options)
    return output.loss.detach(), *torch.autograd.grad(output.loss, list(problem.leaves.values()))


def exact(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """The same in float64 on the CPU."""
    wide = problem.to(torch.float64)
    loss = reference.linear_preference_loss(*wide.args, **wide.kwargs, robust=KL, **options)
    return loss.detach(), *torch.autograd.grad(loss, list(wide.leaves.values()))


def assert_close(found: tuple[Tensor, ...], right: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for place, (ours, truth) in enumerate(zip(found, right, strict=True)):
        assert relative_error(ours.cpu(), truth) < TOLERANCE[dtype], f"result {place}"
