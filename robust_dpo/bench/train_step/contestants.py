"""Who takes part in which comparison."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from transformers import PreTrainedModel

from robust_dpo.bench.record import Role
from robust_dpo.bench.train_step.data import Row
from robust_dpo.bench.train_step.plain import (
    PlainLoop,
    cut_cross_entropy,
    eager,
    on_response_rows,
    whole_log_softmax,
)
from robust_dpo.bench.train_step.setting import Setting
from robust_dpo.bench.train_step.trainers import TRL, Ours
from robust_dpo.bench.train_step.turnstile import Turnstile
from robust_dpo.errors import argument_error

OURS, PLAIN, PLAIN_CCE = "ours", "plain", "plain_cce"
EXACT = {"fp32": "plain_fp64", "bf16": "plain_fp32"}
"""dtype of a comparison -> the plain loop in a wider one, whose losses and weights are taken for the right ones."""


class Loop(Protocol):
    """A training loop."""

    def train(self, setting: Setting, rows: list[Row], turnstile: Turnstile) -> PreTrainedModel:
        """Take all steps of the setting, calling the turnstile after each; the trained model."""
        ...


@dataclass(frozen=True)
class Contestant:
    """One row of a comparison.

    Args:
        name: unique.
        loop: what it runs.
        role: ours or a peer.
        package: module that has to be importable.
        pairs, lists: whether it takes part for K = 2, and for more.
        wider: for comparisons of one dtype: (that dtype, the one that this runs at instead).
    """

    name: str
    loop: Loop
    role: Role = Role.PEER
    package: str = "torch"
    pairs: bool = True
    lists: bool = True
    wider: tuple[str, str] | None = None

    def takes_part(self, setting: Setting) -> bool:
        """Whether this comparison has a row for it."""
        return (self.pairs if setting.pairs else self.lists) and (self.wider is None or self.wider[0] == setting.dtype)

    @property
    def available(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


CONTESTANTS = {
    each.name: each
    for each in (
        Contestant(PLAIN, PlainLoop(partial(on_response_rows, eager))),
        Contestant(EXACT["fp32"], PlainLoop(partial(on_response_rows, eager)), Role.FLOOR, wider=("fp32", "fp64")),
        Contestant(EXACT["bf16"], PlainLoop(partial(on_response_rows, eager)), wider=("bf16", "fp32")),
        Contestant(PLAIN_CCE, PlainLoop(partial(on_response_rows, cut_cross_entropy)), package="cut_cross_entropy"),
        Contestant("trl", TRL(), package="trl", lists=False),
        Contestant("dora_authors", PlainLoop(whole_log_softmax), pairs=False),
        Contestant(OURS, Ours(), Role.OURS),
    )
}
"""By name."""


def ours_with(options: Mapping[str, Any]) -> Contestant:
    """Our trainer with other fields in its configuration, as a row of its own."""
    name = ", ".join([OURS, *(f"{key}={value}" for key, value in options.items())])
    return Contestant(name, Ours(dict(options)), Role.OURS)


def choose(names: tuple[str, ...]) -> list[Contestant]:
    """Those with these names, or all for none; without those whose package is not here.

    Raises:
        ValueError: nobody has that name.
    """
    if unknown := [name for name in names if name not in CONTESTANTS]:
        raise argument_error("compare", f"names out of {', '.join(CONTESTANTS)}", ", ".join(unknown))
    return [each for each in CONTESTANTS.values() if each.available and (not names or each.name in names)]
