"""The dtype of small quantities whose errors an exponential would magnify."""

from __future__ import annotations

import torch


def exact_dtype(device: torch.device) -> torch.dtype:
    """For scores, normalisers and sums over tokens: e^s loses digits where s = hℓ/λ is large in fp32."""
    return torch.float32 if device.type == "mps" else torch.float64
