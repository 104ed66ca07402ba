"""A small synthetic world of prompts and responses whose true quality is known exactly."""

from __future__ import annotations

from robust_dpo.world.corruption import corrupt_labels
from robust_dpo.world.generate import make_world
from robust_dpo.world.styles import STYLES
from robust_dpo.world.town import quality

__all__ = ["STYLES", "corrupt_labels", "make_world", "quality"]
