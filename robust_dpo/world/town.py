"""A small town whose facts are fixed, the prompts that ask for them, and the checker that knows the true quality.

Every fact is one word of a vocabulary that belongs to its topic alone, so what a text claims can be read off exactly.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache

from robust_dpo.errors import argument_error

NAMES = ("Agnes", "Bruno", "Celia", "Dario", "Edith", "Felix", "Greta", "Hugo")

# topic (the word that a prompt asks with) -> the values that a fact can take
TOPICS: dict[str, tuple[str, ...]] = {
    "street": ("Mill", "Harbour", "Orchard", "Tannery", "Quarry", "Lantern", "Willow", "Chapel"),
    "hour": ("six", "seven", "eight", "nine", "ten", "eleven"),
    "goods": ("candles", "bread", "rope", "honey", "kettles", "ribbons", "cheese", "soap"),
    "door": ("red", "blue", "green", "yellow", "black", "white"),
    "pet": ("dog", "goat", "parrot", "tortoise", "cat", "ferret"),
    "holiday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
}

_ASKING = (
    "Tell me about {name}: {topics}.",
    "What should I know about {name}? I need {topics}.",
    "I want to visit {name}. Please give me {topics}.",
    "Write a short note on {name}, with {topics}.",
    "A friend asks about {name}. Cover {topics}.",
)
_WORD = re.compile(r"[A-Za-z]+")
_TOPIC_OF_VALUE = {value.lower(): topic for topic, values in TOPICS.items() for value in values}


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@cache
def true_value(name: str, topic: str) -> str:
    """The fact: which value of `topic` holds for `name`. The same in every process and for every seed."""
    values = TOPICS[topic]
    return values[_digest(f"{name}/{topic}") % len(values)]


@dataclass(frozen=True)
class Question:
    """What a prompt asks: some topics about one person."""

    name: str
    topics: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether this combination of person and topics belongs to the evaluation split (one in five)."""
        return _digest(f"{self.name}/{'+'.join(sorted(self.topics))}") % 5 == 0

    def prompt(self, rng: random.Random) -> str:
        """One wording of the question."""
        asked = [f"the {topic}" for topic in self.topics]
        listed = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + " and " + asked[-1]
        return rng.choice(_ASKING).format(name=self.name, topics=listed)

    @staticmethod
    def parse(prompt: str) -> Question:
        """The question behind a prompt of this world.

        Raises:
            ValueError: the prompt names no person or no topic of the town.
        """
        words = _WORD.findall(prompt)
        names = [word for word in words if word in NAMES]
        topics = tuple(dict.fromkeys(word for word in words if word in TOPICS))
        if len(set(names)) != 1 or not topics:
            raise argument_error(
                "prompt", "a question about one person of the town and at least one topic", repr(prompt)
            )
        return Question(names[0], topics)


def quality(prompt: str, response: str) -> float:
    """True quality of a response: the asked facts that it states, minus the false statements that it makes.

    Every topic that was asked and is stated correctly counts +1, however often it is said; every false value counts
    -1, asked or not; facts that nobody asked for and anything else count nothing. So it lies between minus the number
    of false values and plus the number of asked topics, and listing every possible value does not pay.

    Raises:
        ValueError: `prompt` is not a prompt of this world.
    """
    question = Question.parse(prompt)
    claims = {
        (_TOPIC_OF_VALUE[word], word) for word in map(str.lower, _WORD.findall(response)) if word in _TOPIC_OF_VALUE
    }
    right = {topic for topic, word in claims if word == true_value(question.name, topic).lower()}
    wrong = sum(word != true_value(question.name, topic).lower() for topic, word in claims)
    return float(len(right & set(question.topics)) - wrong)
