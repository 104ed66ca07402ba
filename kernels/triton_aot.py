"""Ahead-of-time compilation of Triton kernels, and what the compiler made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel that a launcher can use.

    Args:
        name: for people, such as "row_logprob bf16, gradient in place, softcap".
        kernel: the `@triton.jit` function.
        arguments: runtime parameter -> Triton type ("*bf16", "i64", "fp32").
        constants: constexpr parameter -> value; None for absent pointers too.
        divisible: runtime parameters that are multiples of 16 (aligned pointers, strides).
        options: num_warps, num_stages, ….
        hot: must not spill, and its loops must load at least 16 bytes at a time.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, object]
    divisible: frozenset[str]
    options: Mapping[str, int]
    hot: bool
