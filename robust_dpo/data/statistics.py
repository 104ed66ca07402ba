"""How long tokenised groups are, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np

from robust_dpo.errors import argument_error, type_error


@dataclass(frozen=True)
class LengthStatistics:
    """Lengths of tokenised groups, in tokens.

    Args:
        groups, responses: how many there are.
        tokens: tokens of all sequences (prompt + response, the prompt counted once per response).
        mean_prompt, mean_response: means over groups and over responses.
        p95_length, max_length: 95th percentile and maximum of the sequence length.
        prompt_share: share of `tokens` that are prompt.
        repeated_prompt_share: share of `tokens` that a shared prompt would save (all copies but one).
        padding_share: share of padding if batches are drawn at random, `batch_groups` groups each.
        batch_groups: the batch size that `padding_share` is for.
        truncated_prompts: groups whose prompt was cut.
        truncated_responses: responses that were cut.
    """

    groups: int
    responses: int
    tokens: int
    mean_prompt: float
    mean_response: float
    p95_length: float
    max_length: int
    prompt_share: float
    repeated_prompt_share: float
    padding_share: float
    batch_groups: int
    truncated_prompts: int
    truncated_responses: int

    def __str__(self) -> str:
        return (
            f"{self.groups} groups, {self.responses} responses, {self.tokens} tokens; "
            f"prompt {self.mean_prompt:.0f} + response {self.mean_response:.0f} tokens on average, "
            f"95 % up to {self.p95_length:.0f}, longest {self.max_length}; "
            f"{self.prompt_share:.0%} prompt ({self.repeated_prompt_share:.0%} repeated), "
            f"{self.padding_share:.0%} padding in batches of {self.batch_groups}; "
            f"truncated: {self.truncated_prompts} prompts, {self.truncated_responses} responses"
        )


def length_statistics(tokenised: datasets.Dataset, batch_groups: int = 8) -> LengthStatistics:
    """Measure the lengths of tokenised groups.

    Args:
        tokenised: what `tokenize_groups` returned.
        batch_groups: groups per batch, for the share of padding; the rows are taken in a shuffled order, as training
            does, with a fixed seed.

    Raises:
        TypeError, ValueError: not a tokenised data set, no rows, or a batch size below 1.
    """
    if not isinstance(tokenised, datasets.Dataset):
        raise type_error("tokenised", "the datasets.Dataset that tokenize_groups returns", tokenised)
    needed = {"prompt_ids", "response_ids", "prompt_cut", "response_cut"}
    if not needed <= set(tokenised.column_names) or not len(tokenised):
        expected = f"rows with the columns {', '.join(sorted(needed))} of tokenize_groups"
        raise argument_error("tokenised", expected, f"{len(tokenised)} rows with {tokenised.column_names}")
    if batch_groups < 1:
        raise argument_error("batch_groups", "at least 1", batch_groups)
    rows = tokenised.select_columns(sorted(needed))
    prompts, sizes, responses = [], [], []
    cut_prompts = cut_responses = 0
    for row in rows:
        prompts.append(len(row["prompt_ids"]))
        sizes.append(len(row["response_ids"]))
        responses += [len(ids) for ids in row["response_ids"]]
        cut_prompts += row["prompt_cut"] > 0
        cut_responses += sum(cut > 0 for cut in row["response_cut"])
    prompt, size, response = np.array(prompts), np.array(sizes), np.array(responses)
    length = np.repeat(prompt, size) + response
    total = int(length.sum())
    longest = np.maximum.reduceat(length, np.cumsum(size) - size)
    return LengthStatistics(
        groups=len(prompt),
        responses=len(response),
        tokens=total,
        mean_prompt=float(prompt.mean()),
        mean_response=float(response.mean()),
        p95_length=float(np.percentile(length, 95)),
        max_length=int(length.max()),
        prompt_share=float((prompt * size).sum()) / total,
        repeated_prompt_share=float((prompt * (size - 1)).sum()) / total,
        padding_share=1 - total / _padded_tokens(longest, size, batch_groups),
        batch_groups=batch_groups,
        truncated_prompts=cut_prompts,
        truncated_responses=cut_responses,
    )


def _padded_tokens(longest: np.ndarray, size: np.ndarray, batch_groups: int) -> int:
    """Elements of all batches: responses of a batch times its longest sequence."""
    order = np.random.default_rng(0).permutation(len(size))
    starts = np.arange(0, len(order), batch_groups)
    widths = np.maximum.reduceat(longest[order], starts)
    return int((widths * np.add.reduceat(size[order], starts)).sum())
