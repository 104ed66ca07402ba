"""calibration_weights by itself: one launch of a few bytes, so what counts is what surrounds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robust_dpo.bench.cases.base import KERNEL_LIMIT, Case, backends_for
from robust_dpo.bench.compare import Candidate, Opened, compare
from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.solution import relative_error
from robust_dpo.bench.timing import Run
from robust_dpo.bench.workbench import Workbench
from robust_dpo.calibration import density_ratio
from robust_dpo.dispatch import CALIBRATION_WEIGHTS, get_calibration_weights


@dataclass(frozen=True)
class CalibrationCase(Case):
    """Density ratios of many classifier probabilities.

    Args:
        count: of probabilities.
    """

    count: int = 1 << 20

    @property
    def name(self) -> str:
        return f"calibration_weights n={self.count}"

    @property
    def group(self) -> str:
        return "calibration"

    @property
    def cost(self) -> float:
        return 8.0 * self.count

    def measure(self, bench: Workbench) -> Record:
        generator = torch.Generator(bench.device).manual_seed(bench.seed)
        probs = torch.rand(self.count, generator=generator, device=bench.device)
        # The mixture of equal parts, γ = 1: h = 1 / (½ + ½ (1 − c)/c).
        exact = 1 / (0.5 + 0.5 * (1 - probs.double()) / probs.double())
        calls: dict[str, tuple[Role, Callable[[], Tensor]]] = {
            "density_ratio, with its checks": (Role.OURS, partial(density_ratio, probs, "mixture")),
            "plain": (Role.PEER, lambda: 1 / (0.5 + 0.5 * (1 - probs) / probs)),
        }
        for name in backends_for(CALIBRATION_WEIGHTS, bench.device, probs.dtype):
            launch = get_calibration_weights(name, bench.device, probs.dtype)
            half, ones = probs.new_full((1, 1), 0.5), probs.new_ones(1)
            mixture = partial(launch, probs[:, None], half, ones, form="mixture", alpha=0.5, num_distributions=2)
            calls[f"launcher, {name}"] = (Role.PEER if name == "torch" else Role.OURS, mixture)
        candidates = [_candidate(name, role, call, exact) for name, (role, call) in calls.items()]
        complete = compare(candidates, bench, self.name, rounds=5 * bench.rounds, warmups=3)
        return Record(
            self.name,
            self.group,
            f"Calibration weights of {self.count} probabilities (mixture)",
            [candidate.row for candidate in candidates],
            "float32",
            {"count": self.count},
            bytes=8 * self.count,
            check="float64",
            complete=complete,
        )


def _candidate(name: str, role: Role, call: Callable[[], Tensor], exact: Tensor) -> Candidate:
    def open_() -> Opened:
        return Opened(Run(call), {"h": relative_error(call(), exact)})

    return Candidate(Row(name, role), open_, {"h": KERNEL_LIMIT})
