"""What an aggregation over groups gives back, and the family whose gradients can be accumulated in one pass."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.errors import argument_error, type_error


@dataclass(frozen=True)
class Solution:
    """A solved aggregation; every tensor is detached.

    Args:
        value: [] the objective L.
        weights: [G] q, the worst-case weights, of sum 1 over the batch that was normalised.
        coefficients: [G] ∂L/∂ℓ: the gradient of L is Σ coefficients · ∇ℓ.
        parameter: [] the robustness in force (λ, β′; infinite for the mean, 0 where all weight is on the argmax).
        log_partition: [] log Σ e^s over the groups of this call.
    """

    value: Tensor
    weights: Tensor
    coefficients: Tensor
    parameter: Tensor
    log_partition: Tensor

    @property
    def ess(self) -> Tensor:
        """[] effective sample size 1/Σq², between 1 and G for weights of sum 1."""
        return 1 / self.weights.square().sum()

    def attach(self, losses: Tensor) -> Tensor:
        """[] the value, differentiable: its gradient is Σ coefficients · ∇losses (of first order only).

        Args:
            losses: [G] the losses that were solved, with their graph.
        """
        coefficients = self.coefficients.to(losses.dtype)
        return self.value.to(losses.dtype) + (coefficients * (losses - losses.detach())).sum()


class RobustObjective(ABC):
    """Turns the losses of a batch's groups into one objective and its weights.

    Subclasses are dataclasses, described in full by `key` but for a state that `advance` changes. One that has a state
    is also a `torch.distributed.checkpoint.stateful.Stateful`.
    """

    @property
    def single_pass(self) -> bool:
        """Whether the weights are softmax(tilt): gradients can be accumulated before the normaliser is known."""
        return False

    @property
    def key(self) -> str:
        """What identifies the objective: its class and parameters."""
        return repr(self)

    @property
    def has_parameter(self) -> bool:
        """Whether the `parameter` of a solution is a finite λ in force, to be logged."""
        return True

    @property
    def needs_domains(self) -> bool:
        """Whether it depends on the domains of the groups: then `at(labels)` is what solves a batch."""
        return False

    def for_domains(self, names: Sequence[str]) -> RobustObjective:
        """The objective for data of these domains, by name; itself where domains make no difference.

        Raises:
            ValueError, TypeError: it cannot be used with them.
        """
        return self

    def labels_of(self, names: Sequence[str]) -> Tensor:
        """[G] int64 on the CPU, for `at`: the domains of groups, by number; 0 where domains make no difference.

        Raises:
            ValueError: a domain is not known.
        """
        return torch.zeros(len(names), dtype=torch.int64)

    def at(self, labels: Tensor, *, training: bool = True) -> RobustObjective:
        """The objective of one batch, whose solutions leave the state as it is.

        Args:
            labels: [G] int64, the domain of each group, as `labels_of` numbers them.
            training: whether the batch is that of an optimizer step. Evaluation takes the state as it is.
        """
        return self

    def advance(
        self, losses: Tensor, calibration: Tensor | None, labels: Tensor, *, taken: Tensor | bool = True
    ) -> None:
        """Move the state on by one optimizer step. Reads nothing back from the device.

        Every rank has to call it with the same global batch.

        Args:
            losses, calibration: as in `solve`, of the global batch of the step.
            labels: as in `at`.
            taken: [] bool, whether the step has changed the weights. Otherwise it does not change the state either, nor
                does one whose losses are not finite.
        """
        return None

    def domain_losses(self, losses: Tensor, calibration: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        """Numbers [] of an evaluation by its domains, by name, for logs. Looks which domains there are.

        Args:
            losses, calibration: as in `solve`, of all groups.
            labels: as in `at`.
        """
        return {}

    def metrics(self) -> dict[str, Tensor]:
        """Numbers [] of the state, by name, for logs."""
        return {}

    @abstractmethod
    def solve(
        self, losses: Tensor, calibration: Tensor | None = None, log_normalizer: Tensor | float | None = None
    ) -> Solution:
        """Value, weights and coefficients for the losses of a batch.

        Args:
            losses: [G] floating (fp16 and bf16 are raised to fp32).
            calibration: [G] h ≥ 0, or None for ones.
            log_normalizer: log Σ e^s over the global batch, where `losses` are a part of it.

        Raises:
            TypeError: an argument is not a floating tensor.
            ValueError: the shapes differ, there is no group, or a `log_normalizer` is not supported.
        """


class ExponentialTilt(RobustObjective):
    """Objectives with weights q = softmax(s), s = hℓ/t for a signed temperature t, and value t · log mean e^s.

    t > 0 favours high losses, t < 0 low ones, t = ±∞ is the mean. The gradient is Σ q h ∇ℓ.

    Parts of a batch: with `log_normalizer` = log Σ e^s over the whole batch, a part gives the weights and
    coefficients of its groups within the whole batch. Its value is then the surrogate t·Σ e^{s − log_normalizer},
    whose gradient at a fixed normaliser is the part's share of the batch's gradient. Log-partitions of parts combine by
    logsumexp into the whole batch's.
    """

    @property
    def single_pass(self) -> bool:
        return True

    @property
    @abstractmethod
    def temperature(self) -> float:
        """t, signed."""

    def tilt(self, losses: Tensor, calibration: Tensor | None = None) -> Tensor:
        """[G] s = hℓ/t, finite for finite losses."""
        limit = torch.finfo(losses.dtype).max
        return (calibrated(losses, calibration) / self.temperature).clamp(-limit, limit)

    def factor(self, calibration: Tensor | None, like: Tensor) -> Tensor:
        """[G] ∂(hℓ)/∂ℓ: h, or ones shaped like `like`."""
        return torch.ones_like(like) if calibration is None else calibration.to(like.dtype)

    @torch.no_grad()
    def solve(
        self, losses: Tensor, calibration: Tensor | None = None, log_normalizer: Tensor | float | None = None
    ) -> Solution:
        losses, calibration = checked(losses, calibration)
        scores = self.tilt(losses, calibration)
        if log_normalizer is None:
            refuse_empty(losses)
            values = calibrated(losses, calibration)
            weights = shifted(values, self.temperature).softmax(0)
            value = self._value(values)
        else:
            weights = (scores - log_normalizer).exp()
            value = self._surrogate(calibrated(losses, calibration), weights)
        return Solution(
            value=value,
            weights=weights,
            coefficients=weights * self.factor(calibration, losses),
            parameter=losses.new_full((), abs(self.temperature)),
            log_partition=scores.logsumexp(0),
        )

    def _value(self, values: Tensor) -> Tensor:
        """[] t · log mean e^{values/t}."""
        extreme = values.amax(0) if self.temperature > 0 else values.amin(0)
        return extreme + self.temperature * log_mean_exp(shifted(values, self.temperature))

    def value_of_parts(self, values: Tensor, counts: Tensor) -> Tensor:
        """[] the value of a batch, from the values [P] of parts of it that were solved by themselves.

        Args:
            values: [P] of the parts.
            counts: [P] groups of each; a part without any has no influence.
        """
        parts = counts / counts.sum()
        extreme = values.amax(0) if self.temperature > 0 else values.amin(0)
        return extreme + self.temperature * log_mean_exp(shifted(values, self.temperature), parts)

    def _surrogate(self, values: Tensor, weights: Tensor) -> Tensor:
        """[] the value of a part of a batch whose weights are normalised over the whole batch."""
        return self.temperature * weights.sum()


def checked(losses: Tensor, calibration: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both detached and in at least fp32, or an error that says what is wrong with them."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        raise type_error("losses", "a floating tensor [G]", losses)
    if losses.ndim != 1:
        raise argument_error("losses", "shape [G]", list(losses.shape))
    losses = losses.detach().to(torch.promote_types(losses.dtype, torch.float32))
    if calibration is None:
        return losses, None
    if not isinstance(calibration, Tensor) or not calibration.is_floating_point():
        raise type_error("calibration", "a floating tensor [G]", calibration)
    if calibration.shape != losses.shape:
        raise argument_error("calibration", f"shape {list(losses.shape)}, one value per group", list(calibration.shape))
    return losses, calibration.detach().to(device=losses.device, dtype=losses.dtype)


def whole_batch(
    objective: RobustObjective,
    losses: Tensor,
    calibration: Tensor | None,
    log_normalizer: Tensor | float | None,
) -> tuple[Tensor, Tensor | None]:
    """As `checked`, for objectives with more than one normaliser: refuses a part of a batch, and an empty one."""
    if log_normalizer is not None:
        expected = f"None: {objective.key} couples the groups by more than one normaliser, solve the whole batch"
        raise argument_error("log_normalizer", expected, log_normalizer)
    losses, calibration = checked(losses, calibration)
    refuse_empty(losses)
    return losses, calibration


def refuse_empty(losses: Tensor) -> None:
    """Weights of sum 1 need a group to carry them."""
    if losses.numel() == 0:
        raise argument_error("losses", "at least one group", "none")


def calibrated(losses: Tensor, calibration: Tensor | None) -> Tensor:
    """[G] hℓ."""
    return losses if calibration is None else calibration * losses


def shifted(values: Tensor, temperature: float | Tensor) -> Tensor:
    """[G] values/t minus their maximum, subtracted before the division: no finite value can overflow to inf − inf."""
    extreme = values.amax(0) if temperature > 0 else values.amin(0)
    return (values - extreme) / temperature


def log_mean_exp(values: Tensor, parts: Tensor | None = None) -> Tensor:
    """[] log mean e^values for values [G] ≤ 0 with maximum 0; the mean has weights `parts` [G] of sum 1, or equal ones.

    Near 0 (a large temperature) the mean of e^x is 1 − tiny, so it is taken through expm1 and log1p; far
    below it, log1p would lose digits near −1 and logsumexp is the accurate form.
    """
    if parts is None:
        gap = values.expm1().mean(0)
        far = values.logsumexp(0) - math.log(values.numel())
    else:
        gap = (parts * values.expm1()).sum(0)
        far = (values + parts.log()).logsumexp(0)
    return torch.where(gap > -0.5, gap.clamp(min=-0.5).log1p(), far)
