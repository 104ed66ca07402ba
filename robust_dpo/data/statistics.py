"""How long tokenised groups are, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from robust_dpo.data.lengths import Integers, TokenLengths
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
        padded_tokens: places of all batches with padding, prompts in every response, if batches are drawn at random,
            `batch_groups` groups each.
        packed_tokens: tokens that are run without padding, prompts in every response. The last token of a response
            predicts nothing, so it is not.
        group_tokens: tokens that are run without padding, each prompt once.
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
    padded_tokens: int
    packed_tokens: int
    group_tokens: int
    batch_groups: int
    truncated_prompts: int
    truncated_responses: int

    @property
    def padding_share(self) -> float:
        """Share of padding in padded batches."""
        return 1 - self.tokens / self.padded_tokens

    def expected_speedup(self, body: int, head: int, *, shared: bool = True) -> float:
        """Time of a training step with padding over that without, from the matrix products alone.

        A layer's products grow with the tokens that are run, those of the head with the tokens of the responses, which
        no layout changes; passes of the policy and of a live reference save the same share of theirs. Attention itself
        is left out: in it, longer sequences save more.

        Args:
            body: parameters of the layers.
            head: parameters of the LM head.
            shared: prompts run once; otherwise once for every response.
        """
        head_work = head * round(self.mean_response * self.responses)
        run = self.group_tokens if shared else self.packed_tokens
        return (body * self.padded_tokens + head_work) / (body * run + head_work)

    def __str__(self) -> str:
        return (
            f"{self.groups} groups, {self.responses} responses, {self.tokens} tokens; "
            f"prompt {self.mean_prompt:.0f} + response {self.mean_response:.0f} tokens on average, "
            f"95 % up to {self.p95_length:.0f}, longest {self.max_length}; "
            f"{self.prompt_share:.0%} prompt ({self.repeated_prompt_share:.0%} repeated), "
            f"{self.padding_share:.0%} padding in batches of {self.batch_groups}; of the places of padded batches "
            f"{self.packed_tokens / self.padded_tokens:.0%} are left without padding, "
            f"{self.group_tokens / self.padded_tokens:.0%} if responses share their prompt; "
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
    lengths = TokenLengths.of(tokenised)
    prompt, size, sequence = lengths.prompts, lengths.sizes, lengths.sequences
    total, responses = int(sequence.sum()), len(lengths.responses)
    return LengthStatistics(
        groups=len(prompt),
        responses=responses,
        tokens=total,
        mean_prompt=float(prompt.mean()),
        mean_response=float(lengths.responses.mean()),
        p95_length=float(np.percentile(sequence, 95)),
        max_length=int(sequence.max()),
        prompt_share=float((prompt * size).sum()) / total,
        repeated_prompt_share=float((prompt * (size - 1)).sum()) / total,
        padded_tokens=_padded_tokens(lengths.longest, size, batch_groups),
        packed_tokens=total - responses,
        group_tokens=int(prompt.sum() + lengths.responses.sum()) - responses,
        batch_groups=batch_groups,
        truncated_prompts=_count_cut(tokenised, "prompt_cut"),
        truncated_responses=_count_cut(tokenised, "response_cut"),
    )


def _count_cut(tokenised: datasets.Dataset, column: str) -> int:
    """Numbers above 0 in a column of numbers or of lists of them."""
    values = tokenised.select_columns([column]).with_format("arrow")[:][column]
    flat = pc.list_flatten(values) if pa.types.is_nested(values.type) else values
    return int(np.count_nonzero(flat.to_numpy() > 0))


def _padded_tokens(longest: Integers, size: Integers, batch_groups: int) -> int:
    """Elements of all batches: responses of a batch times its longest sequence."""
    order = np.random.default_rng(0).permutation(len(size))
    starts = np.arange(0, len(order), batch_groups)
    widths = np.maximum.reduceat(longest[order], starts)
    return int((widths * np.add.reduceat(size[order], starts)).sum())
