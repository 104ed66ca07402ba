"""The worst case over named domains of the data, which the weights approach step by step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from robust_dpo.checks import NON_NEGATIVE, check_number
from robust_dpo.errors import argument_error, type_error
from robust_dpo.robust.base import RobustObjective, Solution, calibrated, whole_batch
from robust_dpo.robust.registry import register_objective

_BATCHES = itertools.count()


@register_objective("group_dro")
@dataclass(eq=False)
class GroupDRO(RobustObjective):
    """Σ_k q_k L_k with q_k ← q_k e^{ηL_k} / Z at every optimizer step, L_k the mean of hℓ over the batch's domain k.

    Sagawa et al. 2020, arXiv 1911.08731, algorithm 1; for preference data Ramesh et al. 2024, arXiv 2405.20304. Their
    groups of the data are domains here. The weights of a step are those after its update. A domain that the batch lacks
    has L_k = 0: it keeps its q_k, but for Z, and adds nothing. q is held as its logarithm, so no weight is ever too
    small to grow again. Two runs that see the same global batches have the same weights.

    `at(labels)` is the objective of one batch, `advance` takes the step.

    Args:
        domains: their names; none are those of the data (`for_domains`). All begin with the same weight.
        step_size: η ≥ 0; 0 weighs all domains alike for ever.

    Raises:
        ValueError: a name is there twice, or `step_size` is out of its range.
        TypeError: `domains` are not strings, or `step_size` is not a number.
    """

    domains: Sequence[str] = ()
    step_size: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.domains, str) or not isinstance(self.domains, Sequence):
            raise type_error("domains", "a sequence of names", self.domains)
        for name in self.domains:
            if not isinstance(name, str):
                raise type_error("domains", "names that are strings", name)
        if len(set(self.domains)) < len(self.domains):
            raise argument_error("domains", "every name once", list(self.domains))
        self.domains = tuple(self.domains)
        self.step_size = check_number("step_size", self.step_size, NON_NEGATIVE)
        self._log_weights = torch.zeros(len(self.domains), dtype=torch.float64, device="cpu").log_softmax(0)

    @property
    def has_parameter(self) -> bool:
        """No: η is how fast the weights move, and does not say how far."""
        return False

    @property
    def needs_domains(self) -> bool:
        return True

    @property
    def weights(self) -> Tensor:
        """[D] q, float64 (fp32 on MPS); on the CPU, and after `advance` where the losses are."""
        return self._log_weights.exp()

    def for_domains(self, names: Sequence[str]) -> GroupDRO:
        """Itself if it knows all of them; with them and a fresh state if it was made without any.

        Raises:
            ValueError: it has other domains.
        """
        if not self.domains:
            return replace(self, domains=names)
        self.labels_of(names)
        return self

    def labels_of(self, names: Sequence[str]) -> Tensor:
        numbers = {name: number for number, name in enumerate(self.domains)}
        unknown = sorted({name for name in names if name not in numbers})
        if unknown:
            expected = f"names among {', '.join(map(repr, self.domains)) or 'none'}"
            raise argument_error("domains", expected, ", ".join(map(repr, unknown)))
        return torch.tensor([numbers[name] for name in names], dtype=torch.int64, device="cpu")

    def at(self, labels: Tensor, *, training: bool = True) -> DomainBatch:
        """The objective of one batch; without `training`, Σ_k q_k L_k / Σ_k q_k over its domains with q as it is."""
        if not self.domains:
            raise argument_error("domains", "the names of the data's domains, GroupDRO(domains=[...])", "none")
        batch = DomainBatch(labels, self._log_weights, self.step_size)
        return batch if training else batch.held()

    def solve(
        self, losses: Tensor, calibration: Tensor | None = None, log_normalizer: Tensor | float | None = None
    ) -> Solution:
        expected = "the objective of one batch, GroupDRO(...).at(labels): it has to know the domains of the groups"
        raise argument_error("robust", expected, self.key)

    @torch.no_grad()
    def advance(
        self, losses: Tensor, calibration: Tensor | None, labels: Tensor, *, taken: Tensor | bool = True
    ) -> None:
        losses, calibration = whole_batch(self, losses, calibration, None)
        means, _ = self.at(labels).means(_exact(calibrated(losses, calibration)))
        now = self._log_weights.to(means)
        self._log_weights = torch.where(means.isfinite().all() & taken, _stepped(now, means, self.step_size), now)

    def domain_losses(self, losses: Tensor, calibration: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        """L_k of the domains that are there, and the largest of them, which does not depend on q."""
        losses, calibration = whole_batch(self, losses, calibration, None)
        means, sizes = self.at(labels).means(_exact(calibrated(losses, calibration)))
        there = sizes.nonzero().flatten().tolist()
        return {f"domain_loss/{self.domains[domain]}": means[domain] for domain in there} | {
            "worst_domain_loss": means[there].amax()
        }

    def metrics(self) -> dict[str, Tensor]:
        return {f"domain_weight/{name}": weight for name, weight in zip(self.domains, self.weights, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The names and log q [D], float64 on the CPU."""
        return {"domains": list(self.domains), "log_weights": self._log_weights.to("cpu", torch.float64, copy=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same domains.

        Raises:
            ValueError: it is of others.
        """
        if tuple(state["domains"]) != self.domains:
            raise argument_error("state", f"that of the domains {list(self.domains)}", state["domains"])
        self._log_weights = state["log_weights"].clone()


@dataclass(frozen=True, eq=False)
class DomainBatch(RobustObjective):
    """Group DRO over one batch: Σ_k q′_k L_k, q′_k = q_k e^{ηL_k} / Z; q′ is taken for a constant, as in the paper.

    Its solutions have coefficients q′_k h/n_k for the n_k groups of domain k, and weights q′_k/n_k brought to sum 1,
    which they have by themselves where the batch has all domains. Their parameter is η.

    Args:
        labels: [G] int64, the domain of each group, from 0 to D − 1.
        log_weights: [D] log q.
        step_size: η.
        number: of the batch, for `key`.

    Raises:
        TypeError: `labels` are not integers.
        ValueError: `labels` are not a vector, or one that is on the CPU is not a number of a domain.
    """

    labels: Tensor
    log_weights: Tensor
    step_size: float
    number: int = field(default_factory=_BATCHES.__next__)

    def __post_init__(self) -> None:
        if not isinstance(self.labels, Tensor) or self.labels.dtype != torch.int64:
            raise type_error("labels", "an int64 tensor [G]", self.labels)
        if self.labels.ndim != 1:
            raise argument_error("labels", "shape [G]", list(self.labels.shape))
        count = len(self.log_weights)
        # On a device, looking would wait for it.
        if self.labels.device.type == "cpu" and ((self.labels < 0) | (self.labels >= count)).any():
            raise argument_error("labels", f"numbers from 0 to {count - 1}", self.labels.tolist())

    @property
    def key(self) -> str:
        return f"GroupDRO(step_size={self.step_size}, batch={self.number})"

    def held(self) -> DomainBatch:
        """With q as it is, but of sum 1 over the domains of the batch: its value is then a mean of their losses."""
        present = self._members(self.labels.device).any(0)
        known = self.log_weights.to(_exact(self.labels.new_zeros((), dtype=torch.float32)))
        return replace(self, log_weights=known.where(present, -torch.inf).log_softmax(0), step_size=0.0)

    def means(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """L [D], 0 where there is no group, and n [D], the number of groups; of values [G]."""
        if values.shape != self.labels.shape:
            raise argument_error("labels", f"shape {list(values.shape)}, one per group", list(self.labels.shape))
        # Not scatter_add, which on a GPU adds in any order: ranks would drift apart, and resumed runs.
        member = self._members(values.device)
        sizes = member.sum(0)
        return values[:, None].where(member, 0).sum(0) / sizes.clamp(min=1), sizes

    def _members(self, device: torch.device) -> Tensor:
        """[G, D] bool, the domain of each group."""
        return self.labels.to(device)[:, None] == torch.arange(len(self.log_weights), device=device)

    @torch.no_grad()
    def solve(
        self, losses: Tensor, calibration: Tensor | None = None, log_normalizer: Tensor | float | None = None
    ) -> Solution:
        losses, calibration = whole_batch(self, losses, calibration, log_normalizer)
        values = _exact(calibrated(losses, calibration))
        means, sizes = self.means(values)
        log_weights = _stepped(self.log_weights.to(values), means, self.step_size)
        log_shares = (log_weights - sizes.to(values).log())[self.labels.to(values.device)]
        coefficients = log_shares.exp().to(losses.dtype)
        return Solution(
            value=(log_weights.exp() * means).sum().to(losses.dtype),
            weights=log_shares.softmax(0).to(losses.dtype),
            coefficients=coefficients if calibration is None else coefficients * calibration,
            parameter=losses.new_tensor(self.step_size),
            log_partition=losses.new_zeros(()),
        )


def _exact(values: Tensor) -> Tensor:
    """In float64, but for MPS, which has none."""
    return values if values.device.type == "mps" else values.double()


def _stepped(log_weights: Tensor, means: Tensor, step_size: float) -> Tensor:
    """[D] log q′ = log q + ηL − log Z, finite for finite L of any size."""
    limit = torch.finfo(means.dtype).max / 4
    raised = log_weights + (step_size * means).clamp(-limit, limit)
    return raised.clamp(min=-limit).log_softmax(0)
