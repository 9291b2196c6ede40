"""Whole numbers in texts that others wrote: labels, annotations, headers."""

from __future__ import annotations

import re

#: The most that the sizes of files and blobs may be.
MAX_SIZE = (1 << 63) - 1

# int() takes signs, spaces, underscores, digits of all scripts and, in seconds, millions of digits.
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,19}", re.ASCII)


def decimal(text: str, most: int = MAX_SIZE) -> int | None:
    """Return the number from 0 to ``most`` that ``text`` is, as a program writes it; None if it is none.

    A bound of digits is not one of the value as long as leading zeros are taken, so they are not.
    """
    if _DECIMAL.fullmatch(text) is None:
        return None
    value = int(text)
    return value if value <= most else None
