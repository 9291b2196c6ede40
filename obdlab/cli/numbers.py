"""Argument types for numbers. The error for text that is no number, or out of bounds, names the wanted range."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: More digits than any argument needs; int() would take seconds for millions of them.
_MOST_DIGITS = 18


def whole(least: int, most: int | None = None, what: str = "number") -> Callable[[str], int]:
    """Return the type of a whole decimal number from ``least`` (0 or more) to ``most``, both included."""
    wanted = (
        f"a {what} of at least {least}, of {_MOST_DIGITS} digits at most"
        if most is None
        else f"a {what} from {least} to {most}"
    )

    def read(text: str) -> int:
        if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS:
            value = int(text)
            if value >= least and (most is None or value <= most):
                return value
        raise argparse.ArgumentTypeError(f"wanted {wanted} (got {text!r})")

    return read


def real(*, above: float | None = None, least: float = 0.0, below: float = float("inf")) -> Callable[[str], float]:
    """Return the type of a number of at least ``least``, or of more than ``above``, and less than ``below``."""
    wanted = f"at least {least:g}" if above is None else f"more than {above:g}"
    if below != float("inf"):
        wanted += f" and less than {below:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if (value >= least if above is None else value > above) and value < below:
            return value
        raise argparse.ArgumentTypeError(f"wanted a number of {wanted} (got {text!r})")

    return read
