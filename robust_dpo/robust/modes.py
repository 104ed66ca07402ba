"""The ablations of DoRA (arXiv 2504.05831) as pairs of an aggregation and whether it is calibrated."""

from __future__ import annotations

from robust_dpo.errors import argument_error
from robust_dpo.robust.base import RobustObjective
from robust_dpo.robust.kl import KLRobust
from robust_dpo.robust.mean import Mean

MODES = ("erm", "reweight", "dro", "dora", "dora_outside")


def from_mode(mode: str, lam: float = 1.0, radius: float | None = None) -> tuple[RobustObjective, bool]:
    """The aggregation of a mode, and whether the calibration is to be used with it.

    Args:
        mode: `erm` mean ℓ; `reweight` mean hℓ; `dro` λ log mean e^{ℓ/λ}; `dora` λ log mean e^{hℓ/λ};
            `dora_outside` mean(h) · λ log mean e^{ℓ/λ}.
        lam: λ of the last three, > 0; not used where `radius` is given.
        radius: ρ ≥ 0, the radius of the KL ball in their place.

    Raises:
        ValueError: no mode has that name, or a parameter is out of its range.
    """
    if mode not in MODES:
        raise argument_error("mode", f"one of {', '.join(MODES)}", repr(mode))
    if mode in ("erm", "reweight"):
        return Mean(), mode == "reweight"
    objective = KLRobust(
        lam=lam if radius is None else None,
        radius=radius,
        calibration="outside" if mode == "dora_outside" else "inside",
    )
    return objective, mode != "dro"
