"""What reference log-probs depend on, field by field, so that a miss can be explained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

# Raised when the meaning of a field or of the stored numbers changes.
FORMAT = 1


@dataclass(frozen=True)
class CacheKey:
    """Everything that log-probs of a reference depend on.

    Args:
        weights: hash of every parameter and buffer, dtypes included.
        configuration: hash of the model's class, configuration and active adapters.
        tokenizer, chat_template: hashes of how texts became ids.
        truncation: limits on lengths, readable.
        head: how logits come from hidden states: route, softcap, scale; readable.
        autocast: dtype of the arithmetic where it is not that of the weights, or "none".
        rows: hash of the token ids.
        collator: class and hash of what makes batches of them.
        format: of the file.
    """

    weights: str
    configuration: str
    tokenizer: str
    chat_template: str
    truncation: str
    head: str
    autocast: str
    rows: str
    collator: str
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """Hash of all fields."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The fields, by name."""
        return json.dumps(asdict(self), sort_keys=True)

    def differences(self, stored: dict[str, object]) -> list[str]:
        """Names of the fields that `stored`, the fields of another key, does not share."""
        return [name for name, value in asdict(self).items() if stored.get(name) != value]
