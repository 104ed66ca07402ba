"""Packed rows in which the responses of a group share their prompt, and attention over them."""

from robust_dpo.layout.attention import (
    AttentionBackend,
    LayoutUnsupportedError,
    attending,
    available_backends,
    register_backend,
    resolve_backend,
    usable_backends,
)
from robust_dpo.layout.choice import LAYOUTS, LayoutPlan, plan_layout
from robust_dpo.layout.dense import SDPA
from robust_dpo.layout.flash import FLASH
from robust_dpo.layout.flex import FLEX
from robust_dpo.layout.packing import Group, GroupSpan, PackedGroups, groups_of, pack_groups
from robust_dpo.layout.segments import SEGMENTS

# "auto" takes the first that can run.
for _backend in (FLEX, FLASH, SEGMENTS, SDPA):
    register_backend(_backend)

__all__ = [
    "LAYOUTS",
    "AttentionBackend",
    "Group",
    "GroupSpan",
    "LayoutPlan",
    "LayoutUnsupportedError",
    "PackedGroups",
    "attending",
    "available_backends",
    "groups_of",
    "pack_groups",
    "plan_layout",
    "register_backend",
    "resolve_backend",
    "usable_backends",
]
