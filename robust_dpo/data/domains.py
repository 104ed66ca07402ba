"""The domain of a group: the part of the data that it belongs to, by the value of one column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robust_dpo.data.rows import BadRow, Reason, as_texts, check_encodable, kind_of

DOMAIN = "domain"
"""The column that domains are kept in."""

_SOURCES = ("sources", "source")


def domain_of(record: Mapping[str, Any], column: str, sources: Sequence[str] | None) -> str:
    """The domain of one row.

    A text or an integer is the name itself; a list of texts is the one that they all are, or all different ones, sorted
    and joined by "+". The columns `sources` and `source` are where the responses came from, however the row spells it.

    Args:
        record: the row as it was read.
        column: that names the domain.
        sources: of its responses, where they are known.

    Raises:
        BadRow: there is no such value, or it is no name.
    """
    value = sources if column in _SOURCES and sources is not None else record.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        value = "+".join(sorted(set(as_texts(value, column))))
    if value is None or (isinstance(value, str) and not value.strip()):
        fields = ", ".join(sorted(record)) or "no fields"
        detail = f"{column!r}, which is to name the row's domain; domain_column (--domain-column) is one of {fields}"
        raise BadRow(Reason.MISSING_FIELD, detail)
    if not isinstance(value, str):
        raise BadRow(Reason.WRONG_TYPE, f"{column} must name a domain, got {kind_of(value)}")
    check_encodable(value)
    return value
