"""The operators: validation, custom ops with their autograd, and the chunked passes through the LM head."""

from robust_dpo.ops.linear_preference_loss import linear_preference_loss
from robust_dpo.ops.preference_loss import preference_loss
from robust_dpo.ops.sequence_logps import SequenceLogps, sequence_logps, sequence_logps_from_logits

__all__ = [
    "SequenceLogps",
    "linear_preference_loss",
    "preference_loss",
    "sequence_logps",
    "sequence_logps_from_logits",
]
