"""How the sources of the small world write: one phrase book per source, and a neutral one that all of them share.

No phrase contains a word of `town.TOPICS`' values, or it would change the quality of the text (a test holds this).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from robust_dpo.world.town import TOPICS, true_value


@dataclass(frozen=True)
class Style:
    """Phrases of one source; `{name}` is the person, `{value}` the fact.

    Args:
        openings: ways to begin; "" is to begin with the facts.
        facts: per topic, ways to state it.
        dodges: what stands in place of a fact that is left out, about as long as a fact, so that length says nothing.
        flourishes: empty phrases; a synthetic source adds more of them to its bad responses.
        closings: ways to end.
    """

    openings: tuple[str, ...]
    facts: dict[str, tuple[str, ...]]
    dodges: tuple[str, ...]
    flourishes: tuple[str, ...]
    closings: tuple[str, ...]


NEUTRAL = Style(
    openings=("",),
    facts={
        "street": ("{name} lives on {value} Street.",),
        "hour": ("The shop opens at {value}.",),
        "goods": ("The shop sells {value}.",),
        "door": ("The door is {value}.",),
        "pet": ("The pet is a {value}.",),
        "holiday": ("The shop is closed on {value}.",),
    },
    dodges=("The rest is not known.",),
    flourishes=("",),
    closings=("",),
)

HUMAN = Style(
    openings=("", "Oh, {name}!", "Sure - I know {name}.", "Right, so."),
    facts={
        "street": ("You'll find {name} over on {value} Street.", "Walk down {value} Street, that's the place."),
        "hour": ("They get going at {value}.", "Come by from {value}, not earlier."),
        "goods": ("Mostly it's {value} in there.", "I always buy {value} from them."),
        "door": ("Look for the {value} door.", "It's the house with a {value} door."),
        "pet": ("Mind the {value}!", "There's a {value} running around too."),
        "holiday": ("Don't go on a {value}.", "{value} is their day off."),
    },
    dodges=("Can't recall that, sorry.", "Ask next door about it."),
    flourishes=("Nice folk, really.", "Say hello from me!"),
    closings=("", "", "Have fun!", "That's about it."),
)

VERBOSE = Style(
    openings=(
        "Certainly! Here is a comprehensive overview of {name}.",
        "Great question! Let us explore {name} in detail.",
        "Thank you for asking about {name}.",
    ),
    facts={
        "street": ("It is worth noting that {name} resides on {value} Street.",),
        "hour": ("Furthermore, the establishment opens at {value}.",),
        "goods": ("Additionally, the establishment offers {value}.",),
        "door": ("Notably, the entrance features a {value} door.",),
        "pet": ("Moreover, a delightful {value} resides there.",),
        "holiday": ("Importantly, the establishment remains closed on {value}.",),
    },
    dodges=("Overall, there is a rich tapestry of further details.", "In essence, every aspect plays a vital role."),
    flourishes=(
        "This showcases a remarkable commitment to the community.",
        "It is important to consider every aspect of this.",
        "Ultimately, this is a testament to the town.",
    ),
    closings=("In conclusion, I hope this helps!", "Please let me know if you need anything else!"),
)

HEDGED = Style(
    openings=("", "Not sure;", "Unverified:"),
    facts={
        "street": ("possibly {value} Street.",),
        "hour": ("opening perhaps {value}.",),
        "goods": ("stock: {value}, presumably.",),
        "door": ("door maybe {value}.",),
        "pet": ("animal: {value}, allegedly.",),
        "holiday": ("closed {value}, I think.",),
    },
    dodges=("remainder unknown; cannot say.", "other data unclear; check."),
    flourishes=("may be wrong.", "sources vary.", "low confidence."),
    closings=("", "verify this.", "no guarantee."),
)

STYLES: dict[str, Style] = {"human": HUMAN, "synthetic_a": VERBOSE, "synthetic_b": HEDGED}


@dataclass(frozen=True)
class Writer:
    """Writes responses of one source.

    Args:
        source: a key of `STYLES`.
        style_strength: probability that a phrase is the source's own and not the neutral one, in [0, 1].
        imitation: probability that a response takes its phrases from another source's book, in [0, 1].
        artefact: probability of one more flourish for each fact that is missing or wrong, in [0, 1]. Humans' flourishes
            are as frequent in good responses as in bad ones.
    """

    source: str
    style_strength: float
    imitation: float
    artefact: float

    def write(self, name: str, plan: dict[str, str], rng: random.Random) -> str:
        """A response that treats every topic of `plan` as asked: "right", "wrong" or "missing"."""
        own = self.source
        if rng.random() < self.imitation:
            own = rng.choice([source for source in STYLES if source != self.source])
        sentences = [self._pick(own, "openings", rng)]
        for topic, treatment in plan.items():
            sentences.append(self._state(own, name, topic, treatment, rng))
        faults = sum(treatment != "right" for treatment in plan.values())
        chances = len(plan) // 2 if self.source == "human" else faults
        for _ in range(chances):
            if rng.random() < self.artefact:
                sentences.insert(rng.randrange(1, len(sentences) + 1), self._pick(own, "flourishes", rng))
        sentences.append(self._pick(own, "closings", rng))
        return " ".join(sentence for sentence in sentences if sentence).replace("{name}", name)

    def _book(self, own: str, rng: random.Random) -> Style:
        return STYLES[own] if rng.random() < self.style_strength else NEUTRAL

    def _pick(self, own: str, part: str, rng: random.Random) -> str:
        phrase: str = rng.choice(getattr(self._book(own, rng), part))
        return phrase

    def _state(self, own: str, name: str, topic: str, treatment: str, rng: random.Random) -> str:
        if treatment == "missing":
            return self._pick(own, "dodges", rng)
        truth = true_value(name, topic)
        value = truth if treatment == "right" else rng.choice([other for other in TOPICS[topic] if other != truth])
        return rng.choice(self._book(own, rng).facts[topic]).replace("{value}", value)
