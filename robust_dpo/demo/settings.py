"""What the demo does, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robust_dpo.errors import argument_error
from robust_dpo.robust import MODES


@dataclass(frozen=True)
class Budget:
    """Sizes and hyper-parameters, the same for every arm. Lengths in tokens, batches in groups.

    Args:
        train_pairs: most training pairs to use.
        held_out_pairs: most held-out pairs to use.
        vocab_size, hidden_size, layers, heads: of the model that is made from scratch.
        max_length: prompt and response together.
        warmup_epochs, warmup_learning_rate: of the supervised warm-up.
        epochs, batch_size, learning_rate: of the preference training.
        beta: scale of the implicit reward.
        lam: robustness λ of the robust arms.
    """

    train_pairs: int
    held_out_pairs: int
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    max_length: int
    warmup_epochs: float
    warmup_learning_rate: float
    epochs: float
    batch_size: int
    learning_rate: float
    beta: float = 0.1
    lam: float = 1.0


@dataclass(frozen=True)
class DemoSettings:
    """Arguments of `run_demo`.

    Args:
        out: directory to write into; must be empty or not exist.
        budget: sizes and hyper-parameters.
        data: preference data, or None for the generated world.
        model: directory or Hub name of a causal language model to start from, or None for a small one from scratch.
        seed: of the first repetition; the others count on from it.
        seeds: repetitions, each with its own split, corruption, start and training.
        corruption: share of the training labels that are reversed, in [0, 1).
        trusted: share of the training pairs that are known to be right, for data without sources, in (0, 1).
        modes: what is trained; the first is the baseline.
    """

    out: Path
    budget: Budget
    data: str | None = None
    model: str | None = None
    seed: int = 0
    seeds: int = 1
    corruption: float = 0.4
    trusted: float = 0.2
    modes: tuple[str, ...] = ("erm", "dora")

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise argument_error("seeds", "at least 1", self.seeds)
        if not 0 <= self.corruption < 1:
            raise argument_error("corruption", "a share in [0, 1)", self.corruption)
        if not 0 < self.trusted < 1:
            raise argument_error("trusted", "a share in (0, 1)", self.trusted)
        unknown = [mode for mode in self.modes if mode not in MODES]
        if unknown or not self.modes or len(set(self.modes)) < len(self.modes):
            raise argument_error("modes", f"different modes among {', '.join(MODES)}", ", ".join(self.modes) or "none")


WORLD = Budget(
    train_pairs=2000,
    held_out_pairs=500,
    vocab_size=1024,
    hidden_size=128,
    layers=3,
    heads=4,
    max_length=128,
    warmup_epochs=3,
    warmup_learning_rate=2e-3,
    epochs=2,
    batch_size=32,
    learning_rate=5e-4,
)
REAL = Budget(
    train_pairs=1500,
    held_out_pairs=600,
    vocab_size=4096,
    hidden_size=128,
    layers=3,
    heads=4,
    max_length=192,
    warmup_epochs=1,
    warmup_learning_rate=1e-3,
    epochs=2,
    batch_size=16,
    learning_rate=3e-4,
)
QUICK_WORLD = Budget(
    train_pairs=800,
    held_out_pairs=200,
    vocab_size=1024,
    hidden_size=96,
    layers=2,
    heads=4,
    max_length=128,
    warmup_epochs=4,
    warmup_learning_rate=3e-3,
    epochs=2,
    batch_size=32,
    learning_rate=1e-3,
)
QUICK_REAL = Budget(
    train_pairs=500,
    held_out_pairs=150,
    vocab_size=2048,
    hidden_size=96,
    layers=2,
    heads=4,
    max_length=128,
    warmup_epochs=1,
    warmup_learning_rate=1e-3,
    epochs=1,
    batch_size=16,
    learning_rate=5e-4,
)
# A pretrained model needs a fraction of the learning rate, and knows its language already.
PRETRAINED_LEARNING_RATE = 1e-5
PRETRAINED_WARMUP_EPOCHS = 0.25


def default_budget(*, real: bool, quick: bool) -> Budget:
    """The sizes that the command uses."""
    if quick:
        return QUICK_REAL if real else QUICK_WORLD
    return REAL if real else WORLD
