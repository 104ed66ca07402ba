"""What only the Triton group_epilogue has; the rest is in test_group_epilogue.py."""

from __future__ import annotations

import pytest
import torch
from epilogue_cases import implementation, poisoned

from robust_dpo import losses

pytest.importorskip("triton")

from robust_dpo.kernels import group_epilogue_triton

SIGMOID = losses.resolve("sigmoid")


def test_a_launch_of_its_own_writes_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    epilogue, sizes = implementation("triton"), (3, 1, 4, 2, 7, 1, 4)
    first = epilogue.vectors(sizes, calibration=True, counted=True)
    second = poisoned(first)
    epilogue(first, SIGMOID, 0.1, 0, len(sizes))
    monkeypatch.setattr(group_epilogue_triton, "ROWS_OF_LAST_PROGRAM", 0)
    epilogue(second, SIGMOID, 0.1, 0, len(sizes))
    assert first.coefficients is not None and second.coefficients is not None
    assert not first.coefficients.isnan().any()
    assert torch.equal(first.coefficients, second.coefficients)


def test_groups_of_more_than_sixty_four_responses_are_refused() -> None:
    epilogue = implementation("triton")
    assert epilogue.supports(SIGMOID, 64)
    assert not epilogue.supports(SIGMOID, 65)
    expected = r"vectors.widest: expected at most 64 responses in a group, got 65"
    with pytest.raises(ValueError, match=expected):
        epilogue(epilogue.vectors((65,)), SIGMOID, None, 0, 1)
