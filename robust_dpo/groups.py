"""Responses and the groups that they form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.errors import argument_error, type_error


@dataclass(frozen=True)
class Groups:
    """What a preference loss sees: G groups of up to K responses, padded to [G, K].

    Padded slots hold logps 0, length 1, score 0 and are False in `mask`; they come last in a group.

    Args:
        logps: [G, K] float, log-prob of each response under the policy (sum over its tokens).
        lengths: [G, K] float, tokens of each response, at least 1.
        mask: [G, K] bool, True where there is a response.
        ref_logps: [G, K] float, the same under the reference, or None.
        scores: [G, K] float, quality of each response, higher is better, or None: best first.
    """

    logps: Tensor
    lengths: Tensor
    mask: Tensor
    ref_logps: Tensor | None = None
    scores: Tensor | None = None

    @property
    def log_ratios(self) -> Tensor:
        """[G, K] policy minus reference log-prob.

        Raises:
            ValueError: there is no reference.
        """
        if self.ref_logps is None:
            raise argument_error("ref_logps", "a reference for a loss that uses log-ratios", None)
        return self.logps - self.ref_logps

    @property
    def mean_logps(self) -> Tensor:
        """[G, K] log-prob per token."""
        return self.logps / self.lengths

    @property
    def quality(self) -> Tensor:
        """[G, K] what responses are ranked by: `scores`, or the position (best first) where there are none."""
        if self.scores is not None:
            return self.scores
        positions = torch.arange(self.logps.shape[1], device=self.logps.device, dtype=self.logps.dtype)
        return -positions.expand_as(self.logps)

    @property
    def order(self) -> Tensor:
        """[G, K] int64, indices of the responses best first (ties in order of position), padded slots last."""
        quality = self.quality.masked_fill(~self.mask, float("-inf"))
        return quality.argsort(dim=1, descending=True, stable=True)


@dataclass(frozen=True)
class GroupLayout:
    """How S flat responses form G groups.

    Args:
        slots: [G, K] int64, index of the response in the flat vector; 0 where `mask` is False.
        mask: [G, K] bool.
        group_of: [S] int64, the group of each response.
    """

    slots: Tensor
    mask: Tensor
    group_of: Tensor

    @property
    def num_groups(self) -> int:
        return self.slots.shape[0]

    @staticmethod
    def build(num_responses: int, group_size: int, group_sizes: Tensor | None, device: torch.device) -> GroupLayout:
        """Layout of equal groups (`group_size`), or of ragged ones (`group_sizes` [G] int64).

        Raises:
            ValueError: the sizes do not add up to the number of responses, or one of them is below 1.
        """
        if group_sizes is None:
            if group_size < 1 or num_responses % group_size:
                raise argument_error("group_size", f"a divisor of the {num_responses} responses", group_size)
            index = torch.arange(num_responses, device=device)
            slots = index.view(num_responses // group_size, group_size)
            return GroupLayout(slots, torch.ones_like(slots, dtype=torch.bool), index // group_size)
        if group_sizes.ndim != 1 or group_sizes.is_floating_point():
            raise type_error("group_sizes", "a one-dimensional integer tensor", group_sizes)
        sizes = group_sizes.tolist()
        check_group_sizes(sizes, num_responses)
        return GroupLayout.ragged(
            group_sizes.to(device=device, dtype=torch.int64), max(sizes, default=1), num_responses
        )

    @staticmethod
    def ragged(sizes: Tensor, widest: int, num_responses: int) -> GroupLayout:
        """Layout of groups of `sizes` [G] int64, of which the host knows the largest and the sum."""
        groups, column = (torch.arange(count, device=sizes.device) for count in (len(sizes), widest))
        mask = column < sizes[:, None]
        starts = sizes.cumsum(0) - sizes
        group_of = groups.repeat_interleave(sizes, output_size=num_responses)
        return GroupLayout((starts[:, None] + column) * mask, mask, group_of)

    def part(self, first_group: int, last_group: int, first_response: int, last_response: int) -> GroupLayout:
        """Groups first … last − 1 over their own responses, counted from zero."""
        groups = slice(first_group, last_group)
        mask = self.mask[groups]
        slots = (self.slots[groups] - first_response) * mask
        return GroupLayout(slots, mask, self.group_of[first_response:last_response] - first_group)

    def pad(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Flat [S] → [G, K], `fill` where there is no response. Differentiable."""
        return values[self.slots].masked_fill(~self.mask, fill)

    def unpad(self, values: Tensor) -> Tensor:
        """[G, K or more] → flat [S]."""
        column = torch.arange(len(self.group_of), device=self.group_of.device) - self.slots[self.group_of, 0]
        return values[self.group_of, column]

    def group_mean(self, values: Tensor) -> Tensor:
        """Flat [S] → [G], the mean over the responses of each group."""
        return self.pad(values).sum(1) / self.mask.sum(1)


def check_group_sizes(sizes: list[int], num_responses: int) -> None:
    """Refuse sizes of groups that cannot be those of `num_responses` responses."""
    if min(sizes, default=1) < 1:
        raise argument_error("group_sizes", "at least one response in every group", sizes)
    if sum(sizes) != num_responses:
        raise argument_error("group_sizes", f"a sum of {num_responses}, the number of responses", sum(sizes))
