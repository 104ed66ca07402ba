"""The paper's classifier: a pretrained encoder such as bert-base, fine-tuned to tell target responses from others."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)


class EncoderClassifier:
    """`AutoModelForSequenceClassification` with two labels, fine-tuned by the Hugging Face trainer.

    Args:
        name: hub name or directory of the encoder.
        seed: of the new classification layer, the order of the samples and dropout.
        epochs, learning_rate, batch_size: of the fine-tuning (AdamW, linear decay).
        max_length: tokens of a text that are read; the rest is cut off.
    """

    inner_folds = 1  # refitting an encoder for every inner fold costs more than the samples it would save

    def __init__(
        self,
        name: str | Path,
        seed: int,
        *,
        epochs: float = 2.0,
        learning_rate: float = 2e-5,
        batch_size: int = 16,
        max_length: int = 512,
    ) -> None:
        self._name, self._seed = str(name), seed
        self._epochs, self._learning_rate, self._batch_size = epochs, learning_rate, batch_size
        self._tokenizer = AutoTokenizer.from_pretrained(self._name)
        self._max_length = min(max_length, self._tokenizer.model_max_length)
        self._trainer: Trainer | None = None

    def fit(self, texts: Sequence[str], labels: NDArray[np.int64]) -> None:
        """Learns P(label = 1 | text) from texts [S] and labels [S] (0 or 1)."""
        with _seeded(self._seed), tempfile.TemporaryDirectory() as scratch:
            model = AutoModelForSequenceClassification.from_pretrained(self._name, num_labels=2)
            arguments = TrainingArguments(
                output_dir=scratch,
                num_train_epochs=self._epochs,
                learning_rate=self._learning_rate,
                per_device_train_batch_size=self._batch_size,
                per_device_eval_batch_size=2 * self._batch_size,
                seed=self._seed,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            self._trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=self._encode(texts).add_column("labels", labels),
                data_collator=DataCollatorWithPadding(self._tokenizer),
            )
            self._trainer.remove_callback(PrinterCallback)
            self._trainer.train()

    def decide(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[S] log-odds of label 1, not yet calibrated.

        Raises:
            RuntimeError: `fit` was not called.
        """
        if self._trainer is None:
            raise RuntimeError("EncoderClassifier.decide: call fit first")
        with _seeded(self._seed):  # the trainer's data loader draws from torch's generator even without shuffling
            logits = np.asarray(self._trainer.predict(self._encode(texts)).predictions, dtype=np.float64)
        decisions: NDArray[np.float64] = logits[:, 1] - logits[:, 0]
        return decisions

    def _encode(self, texts: Sequence[str]) -> Dataset:
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self._max_length)
        return Dataset.from_dict(dict(encoded))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds every generator that the trainer draws from, and puts their states back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
