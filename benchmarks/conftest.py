"""Options and devices of the microbenchmarks."""

from __future__ import annotations

import pytest
import torch

from robust_dpo.bench.problem import Shape

DEVICES = {"cpu": torch.device("cpu"), "gpu": torch.device("cuda")}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("robust_dpo benchmarks")
    group.addoption("--vocab", type=int, default=16384, help="vocabulary of the head (default 16384)")
    group.addoption("--width", type=int, default=256, help="hidden size (default 256)")
    group.addoption("--sequences", type=int, default=4, help="sequences, two to a pair (default 4)")
    group.addoption("--tokens", type=int, default=256, help="tokens of a sequence, half of them response (default 256)")


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, then the GPU where there is one; its name is part of every id."""
    found = DEVICES[request.param]
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU that this torch can use")
    return found


@pytest.fixture(scope="module")
def shape(request: pytest.FixtureRequest) -> Shape:
    options = request.config.option
    return Shape(options.vocab, options.width, options.sequences, options.tokens)
