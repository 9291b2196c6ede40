"""Whole numbers in foreign texts: labels, annotations, headers."""

from __future__ import annotations

import re

#: Largest size of a file or blob.
MAX_SIZE = (1 << 63) - 1

# int() takes signs, spaces, underscores, digits of all scripts and, given seconds, millions of digits.
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,19}", re.ASCII)


def decimal(text: str, most: int = MAX_SIZE) -> int | None:
    """Return the number that ``text`` spells, if it is canonical decimal and from 0 to ``most``; else None.

    Leading zeros are refused: with them the bound on digits would not bound the value.
    """
    if _DECIMAL.fullmatch(text) is None:
        return None
    value = int(text)
    return value if value <= most else None
