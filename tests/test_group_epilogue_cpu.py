"""What only the native group_epilogue has; the rest is in test_group_epilogue.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from epilogue_cases import EpilogueVectors, Implementation, implementation, poisoned, solve

from robust_dpo import losses
from robust_dpo.dispatch import get_group_epilogue

OUTPUTS = ("logps", "ref_logps", "losses", "derivative", "coefficients", "state")
SIGMOID = losses.resolve("sigmoid")


@pytest.fixture
def epilogue() -> Implementation:
    return implementation("cpu")


def assert_same_bits(first: EpilogueVectors, second: EpilogueVectors) -> None:
    for name in OUTPUTS:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_auto_takes_it_for_every_built_in_loss(epilogue: Implementation) -> None:
    for loss, expected in ((SIGMOID, epilogue.launcher), (losses.resolve(lambda groups: groups.logps[:, 0]), None)):
        assert get_group_epilogue("auto", "cpu", torch.float32, loss, 2) is expected


def test_the_threads_make_no_difference(epilogue: Implementation) -> None:
    # 200 K rows are three pieces of work.
    one = epilogue.vectors((2, 3) * 100, longest=800, counted=True, calibration=True)
    assert len(one.token_logps) > 3 * 2**16 * 0.9
    many, before = poisoned(one), torch.get_num_threads()
    for vectors, threads in ((one, 1), (many, 4)):
        torch.set_num_threads(threads)
        epilogue(vectors, SIGMOID, 0.3, 0, 200)
    torch.set_num_threads(before)
    assert_same_bits(one, many)
    exact = solve(one, SIGMOID)
    torch.testing.assert_close(one.logps, exact.logps.float(), rtol=2**-23, atol=0.0)
    torch.testing.assert_close(one.losses, exact.losses.float(), rtol=2**-22, atol=0.0)
    assert one.coefficients is not None and not one.coefficients.isnan().any()


def test_groups_may_be_of_any_size(epilogue: Implementation) -> None:
    vectors = epilogue.vectors((300, 1, 65), longest=3, scores="tied")
    for name in ("plackett_luce", "sigmoid", "lire"):
        loss = losses.resolve(name)
        assert epilogue.supports(loss, 300)
        epilogue(vectors, loss, None, 0, 3)
        exact = solve(vectors, loss)
        torch.testing.assert_close(vectors.losses, exact.losses.float(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(vectors.derivative, exact.derivative.float(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_no_row_at_all(epilogue: Implementation, reference: str) -> None:
    """Empty vectors have no address; that a live reference is there must be known all the same."""
    vectors = epilogue.vectors((2, 2), lengths=[0] * 4, reference=reference, counted=True, calibration=True)
    epilogue(vectors, SIGMOID, 1.0, 0, 2)
    assert vectors.logps.tolist() == [0.0] * 4
    assert vectors.ref_logps is not None and vectors.state is not None and vectors.calibration is not None
    assert vectors.ref_logps.abs().tolist() == [0.0] * 4
    torch.testing.assert_close(vectors.losses, torch.full((2,), 2.0).log())
    scores = vectors.calibration.double() * vectors.losses.double()
    expected = [scores.max().item(), (scores - scores.max()).exp().sum().item(), 1.0]
    assert vectors.state.tolist() == pytest.approx(expected, rel=1e-12)


def test_calls_from_several_threads_at_once(epilogue: Implementation) -> None:
    """The interpreter lock is released meanwhile."""
    wanted = epilogue.vectors((4,) * 50, longest=200, calibration=True)
    others = [poisoned(wanted) for _ in range(8)]
    epilogue(wanted, SIGMOID, 0.3, 0, 50)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda vectors: epilogue(vectors, SIGMOID, 0.3, 0, 50), others))
    for other in others:
        assert_same_bits(wanted, other)


def test_tensors_elsewhere_are_refused(epilogue: Implementation) -> None:
    vectors = epilogue.vectors((2,), reference="none")
    moved = {name: value.to("meta") for name, value in vars(vectors).items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match=r"vectors.logps: expected a tensor on the CPU, got meta"):
        epilogue(replace(vectors, **moved), SIGMOID, 1.0, 0, 1)
