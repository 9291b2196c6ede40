"""Foreign text for logs and terminals: registries, images, labels and clients choose its characters.

Control characters move a terminal's cursor, line breaks forge further lines, and bidirectional controls reverse the
order in which a text is shown. Unicode counts all of them among the characters that are not printable.
"""

from __future__ import annotations

_FURTHER = "\n  "


def printable(text: str) -> str:
    """Return the text as one line: each character that is not printable is escaped as in a Python string."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_lines(text: str) -> str:
    """Return a text of several lines, such as a traceback: as :func:`printable`, but line feeds stay.

    The second and all further lines are indented, so that they cannot pass for lines of their own.
    """
    if text.isprintable():
        return text
    return _FURTHER.join(printable(line.expandtabs()) for line in text.split("\n"))
