"""Pages with figures: each stands between two comments, the first of which names it.

<!-- figures: peers-warm -->...<!-- end of figures -->
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(<!-- figures: (\S+) -->)(.*?)(<!-- end of figures -->)", re.DOTALL)
_CODE = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]*`|\]\([^)]*\)", re.DOTALL | re.MULTILINE)
#: A number of a measured quantity.
_QUANTITY = re.compile(
    r"\d(?:[\d,.]*\d)? ?(?:s|ms|µs|us|MB|GB|MB/s|GB/s|MiB/s|IOPS|times|%|minutes?|seconds)(?![\w/])"
)


class PageError(Exception):
    """A page names figures that do not exist, or an end is missing."""


def pages() -> list[Path]:
    """Return README and every page of the docs and of the measured experiments, but the changes."""
    measured = sorted((ROOT / "experiments" / "measured").rglob("README.md"))
    found = [ROOT / "README.md", *measured, *sorted(ROOT.glob("docs/**/*.md"))]
    return [path for path in found if path.name not in ("changes.md", "commands.md")]


def written(text: str, figures: Mapping[str, str], where: str = "page") -> str:
    """Return the page with today's figures. Raises PageError."""
    if text.count("<!-- figures: ") != text.count("<!-- end of figures -->"):
        raise PageError(f"{where}: a comment that begins figures has no end, or the reverse")

    def block(match: re.Match[str]) -> str:
        if match[2] not in figures:
            raise PageError(f"{where}: unknown figures (got {match[2]!r}, wanted one of {', '.join(figures)})")
        value = figures[match[2]]
        return match[1] + (f"\n{value}\n" if "\n" in value else value) + match[4]

    return _BLOCK.sub(block, text)


def names(text: str) -> list[str]:
    """Return the names of a page's figures."""
    return [match[2] for match in _BLOCK.finditer(text)]


def unsupported(text: str) -> Iterator[str]:
    """Yield the measured quantities outside all figures, with the line of each."""
    rest = _CODE.sub("", _BLOCK.sub("", text))
    for line in rest.splitlines():
        for match in _QUANTITY.finditer(line):
            yield f"{match[0]}: {line.strip()}"
