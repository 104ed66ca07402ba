"""Log-probs of a reference over a data set, kept on disk: what identifies them, how they are stored and checked."""

from robust_dpo.reference_cache.fingerprint import (
    base_tensors,
    collator_fingerprint,
    configuration_fingerprint,
    model_tensors,
    weights_fingerprint,
)
from robust_dpo.reference_cache.journal import Journal, exclusive_journal
from robust_dpo.reference_cache.key import CacheKey
from robust_dpo.reference_cache.store import COLUMN, BrokenEntry, ReferenceCache

__all__ = [
    "COLUMN",
    "BrokenEntry",
    "CacheKey",
    "Journal",
    "ReferenceCache",
    "base_tensors",
    "collator_fingerprint",
    "configuration_fingerprint",
    "exclusive_journal",
    "model_tensors",
    "weights_fingerprint",
]
