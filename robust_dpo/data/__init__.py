"""Preference data: files and hub names → canonical rows → token ids → batches."""

from robust_dpo.data.collate import IGNORE_INDEX, PreferenceCollator
from robust_dpo.data.formats import FORMATS, Format, register_format
from robust_dpo.data.load import LoadReport, PreferenceData, load_preferences
from robust_dpo.data.rows import BadRow, Reason, Row, text_field
from robust_dpo.data.save import save_preferences
from robust_dpo.data.split import split_by_prompt
from robust_dpo.data.statistics import LengthStatistics, length_statistics
from robust_dpo.data.tokenize import tokenize_groups

__all__ = [
    "FORMATS",
    "IGNORE_INDEX",
    "BadRow",
    "Format",
    "LengthStatistics",
    "LoadReport",
    "PreferenceCollator",
    "PreferenceData",
    "Reason",
    "Row",
    "length_statistics",
    "load_preferences",
    "register_format",
    "save_preferences",
    "split_by_prompt",
    "text_field",
    "tokenize_groups",
]
