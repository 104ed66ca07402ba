"""Every loss × aggregation × calibration × K against float64 autograd of the reference. The cases are generated.

The reference takes the losses from the same registry, so this checks everything around them; the formulas of the losses
are checked independently in tests/test_losses.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import make_problem, relative_error

import robust_dpo
from robust_dpo import DrDPO, KLRobust, Mean, reference
from robust_dpo.calibration import density_ratio
from robust_dpo.losses import available_losses

pytestmark = pytest.mark.usefixtures("one_thread")

AGGREGATIONS = {
    "mean": Mean(),
    "kl": KLRobust(lam=0.7),
    "kl_outside": KLRobust(lam=0.7, calibration="outside"),
    "kl_radius": KLRobust(radius=0.2),
    "dr_dpo": DrDPO(beta=0.6),
}
CALIBRATIONS = ("none", "paper", "mixture", "official")
SIZES = {"K2": [2, 2, 2, 2], "K3": [3, 3, 3], "K4": [4, 4], "ragged": [2, 4, 3, 2]}
CASES = list(itertools.product(available_losses(), AGGREGATIONS, CALIBRATIONS, SIZES))


def calibration_of(form: str, sizes: list[int]) -> torch.Tensor | None:
    if form == "none":
        return None
    groups = [density_ratio(torch.rand(1, size, dtype=torch.float64) * 0.9 + 0.05, form=form)[0] for size in sizes]
    return torch.cat(groups)


@pytest.mark.parametrize(("loss", "aggregation", "form", "sizes"), CASES, ids=["-".join(case) for case in CASES])
def test_matches_float64_autograd(loss: str, aggregation: str, form: str, sizes: str) -> None:
    robust = AGGREGATIONS[aggregation]
    problem = make_problem(SIZES[sizes], bias=True, scores=loss == "lire" or sizes == "ragged").to(torch.float64)
    problem.kwargs["calibration"] = calibration_of(form, SIZES[sizes])
    expected = reference.linear_preference_loss(*problem.args, loss=loss, robust=robust, **problem.kwargs)
    leaves = list(problem.leaves.values())
    expected_grads = torch.autograd.grad(expected, leaves, materialize_grads=True)
    # Chunks of the smallest size, so that the groups are spread over several.
    output = robust_dpo.linear_preference_loss(*problem.args, loss=loss, robust=robust, chunk_bytes=1, **problem.kwargs)
    grads = torch.autograd.grad(output.loss, leaves)
    tolerance = 1e-7 if aggregation == "kl_radius" else 1e-11
    # The reference stops at λ = 1e-9, so it is not quite 0 where every loss is (rrhf with all ranks right).
    torch.testing.assert_close(output.loss, expected, rtol=tolerance, atol=1e-9)
    for name, grad, expected_grad in zip(problem.leaves, grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) < 10 * tolerance, name
    assert torch.isclose(output.weights.sum(), torch.ones((), dtype=torch.float64))


def test_the_count_of_generated_cases(capsys: pytest.CaptureFixture[str]) -> None:
    expected = len(available_losses()) * len(AGGREGATIONS) * len(CALIBRATIONS) * len(SIZES)
    with capsys.disabled():
        print(f"\n{len(CASES)} generated combinations of loss, aggregation, calibration and K")
    assert len(set(CASES)) == expected >= 540
