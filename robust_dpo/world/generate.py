"""Draws preference data from the small world."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any, Literal

from datasets import Dataset

from robust_dpo.errors import argument_error, type_error
from robust_dpo.world.styles import STYLES, Writer
from robust_dpo.world.town import NAMES, TOPICS, Question, quality

DEFAULT_PROPORTIONS: Mapping[str, float] = {"human": 0.4, "synthetic_a": 0.3, "synthetic_b": 0.3}

Split = Literal["all", "train", "eval"]


def _reachable(num_topics: int) -> range:
    """Qualities that responses are planned with: at most half of the topics are stated wrongly on balance."""
    return range(-(num_topics // 2), num_topics + 1)


MAX_RESPONSES = len(_reachable(len(TOPICS)))  # the qualities of a group are all different


def make_world(
    num_prompts: int,
    seed: int,
    responses_per_prompt: int = 2,
    *,
    proportions: Mapping[str, float] = DEFAULT_PROPORTIONS,
    mixed: float = 0.0,
    style_strength: float = 0.6,
    imitation: float = 0.08,
    artefact: float = 0.6,
    split: Split = "all",
) -> Dataset:
    """Prompts with responses whose true quality is known exactly.

    All facts of the world are the same for every seed; the seed draws questions, sources, qualities and wordings.
    Within a group all qualities differ, and whether a response is good says nothing about its length in the human
    source; the synthetic sources add empty flourishes to their bad responses, so a wrong label there teaches an
    artefact.

    Args:
        num_prompts: rows to draw, at least 1.
        seed: the same seed gives the same rows in every process.
        responses_per_prompt: K, from 2 to 10.
        proportions: share of the rows of each source (keys of `STYLES`), not negative, made to sum to 1; counts are
            exact to one row.
        mixed: probability in [0, 1] that each response of a row draws its own source by `proportions`, instead of all
            coming from one.
        style_strength: probability in [0, 1] that a phrase is the source's own and not one that all sources share; 0
            makes the sources equal but for their flourishes.
        imitation: probability in [0, 1] that a response is phrased like one of another source, which bounds how well
            any classifier can tell the sources apart.
        artefact: probability in [0, 1] of a flourish per fault of a synthetic response.
        split: "train" and "eval" ask disjoint combinations of person and topics; "all" asks any.

    Returns:
        A `datasets.Dataset` of canonical rows: id, prompt, responses (best first), scores (true quality), sources.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check_count("num_prompts", num_prompts, 1, None)
    _check_count("responses_per_prompt", responses_per_prompt, 2, MAX_RESPONSES)
    _check_count("seed", seed, None, None)
    probabilities = {"mixed": mixed, "style_strength": style_strength, "imitation": imitation, "artefact": artefact}
    for argument, value in probabilities.items():
        if not 0 <= value <= 1:
            raise argument_error(argument, "a number in [0, 1]", value)
    if split not in ("all", "train", "eval"):
        raise argument_error("split", "'all', 'train' or 'eval'", repr(split))
    shares = _shares(proportions)

    rng = random.Random(f"robust_dpo.world/{seed}")
    questions = _questions(split, responses_per_prompt)
    writers = {source: Writer(source, style_strength, imitation, artefact) for source in shares}
    row_sources = _exact_draw(shares, num_prompts, rng)
    return Dataset.from_list(
        [
            _row(
                f"world-{seed}-{index}",
                rng.choice(questions),
                source,
                shares,
                mixed,
                responses_per_prompt,
                writers,
                rng,
            )
            for index, source in enumerate(row_sources)
        ]
    )


def _row(
    row_id: str,
    question: Question,
    source: str,
    shares: Mapping[str, float],
    mixed: float,
    num_responses: int,
    writers: Mapping[str, Writer],
    rng: random.Random,
) -> dict[str, Any]:
    topics = list(question.topics)
    rng.shuffle(topics)
    question = Question(question.name, tuple(topics))
    prompt = question.prompt(rng)
    sources = [source] * num_responses
    if rng.random() < mixed:
        sources = rng.choices(list(shares), weights=list(shares.values()), k=num_responses)
    targets = _targets(len(topics), num_responses, rng)
    responses = [
        writers[name].write(question.name, _plan(topics, target, rng), rng)
        for name, target in zip(sources, targets, strict=True)
    ]
    scores = [quality(prompt, response) for response in responses]
    order = sorted(range(num_responses), key=lambda index: -scores[index])
    return {
        "id": row_id,
        "prompt": prompt,
        "responses": [responses[index] for index in order],
        "scores": [scores[index] for index in order],
        "sources": [sources[index] for index in order],
    }


def _targets(num_topics: int, num_responses: int, rng: random.Random) -> list[int]:
    """Different qualities for the responses of a group, as far apart as possible without being the same every time."""
    reachable = _reachable(num_topics)
    gap = len(reachable) // num_responses
    base = rng.randrange(len(reachable) - gap * (num_responses - 1))
    targets = [reachable[base + gap * index] for index in range(num_responses)]
    rng.shuffle(targets)
    return targets


def _plan(topics: list[str], target: int, rng: random.Random) -> dict[str, str]:
    """How to treat each topic so that right minus wrong is `target`; what is left over stays unanswered."""
    stated = "right" if target > 0 else "wrong"
    treatments = [stated] * abs(target) + ["missing"] * (len(topics) - abs(target))
    rng.shuffle(treatments)
    return dict(zip(topics, treatments, strict=True))


def _questions(split: Split, num_responses: int) -> list[Question]:
    """Every question of the split with enough topics for `num_responses` different qualities."""
    fewest = next(size for size in range(2, len(TOPICS) + 1) if len(_reachable(size)) >= num_responses)
    sizes = range(fewest, max(4, fewest + 1))
    asked = [
        Question(name, topics) for name in NAMES for size in sizes for topics in itertools.combinations(TOPICS, size)
    ]
    return [question for question in asked if split == "all" or question.held_out == (split == "eval")]


def _shares(proportions: Mapping[str, float]) -> dict[str, float]:
    unknown = sorted(set(proportions) - set(STYLES))
    if unknown:
        raise argument_error("proportions", f"sources among {', '.join(STYLES)}", ", ".join(unknown))
    total = sum(proportions.values())
    if any(not share >= 0 for share in proportions.values()) or not 0 < total < float("inf"):
        raise argument_error("proportions", "shares that are not negative, finite and not all zero", dict(proportions))
    return {source: proportions[source] / total for source in STYLES if proportions.get(source, 0) > 0}


def _exact_draw(shares: Mapping[str, float], count: int, rng: random.Random) -> list[str]:
    """`count` sources in random order, each share exact to one row (largest remainders)."""
    numbers = {source: int(share * count) for source, share in shares.items()}
    by_remainder = sorted(shares, key=lambda source: numbers[source] - shares[source] * count)
    for source in itertools.islice(itertools.cycle(by_remainder), count - sum(numbers.values())):
        numbers[source] += 1
    drawn = [source for source, number in numbers.items() for _ in range(number)]
    rng.shuffle(drawn)
    return drawn


def _check_count(argument: str, value: int, least: int | None, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise type_error(argument, "an integer", value)
    if (least is not None and value < least) or (most is not None and value > most):
        raise argument_error(argument, f"at least {least}" + ("" if most is None else f" and at most {most}"), value)
