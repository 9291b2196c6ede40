"""A .dockerignore file: the paths of a build context that a build does not see.

Source: Docker's documentation of .dockerignore, and moby's pattern matcher as BuildKit uses it. Patterns are those of
Go's filepath.Match, with ** for any number of directories; the last pattern that matches a path decides, ! makes an
exception. A pattern that decided about a directory matches everything below it, too.
"""

from __future__ import annotations

import posixpath
import re
from functools import lru_cache
from typing import TYPE_CHECKING

from obdlab.build.dockerfile import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterable

NAME = ".dockerignore"
#: Most bytes of the file, and most patterns in it.
MOST_BYTES = 1 << 20
_MOST_PATTERNS = 10_000
_MOST_STARS = 16
# Results of directories, which are asked for again for each file below them.
_MOST_KNOWN = 1000


class Ignored:
    """The paths that a file's patterns leave out."""

    def __init__(self, patterns: Iterable[tuple[re.Pattern[str], bool]] = ()) -> None:
        self._patterns = list(patterns)
        self._matches: dict[str, tuple[bool, tuple[bool, ...]]] = {}
        #: True if a path below a directory that is left out may be seen nevertheless.
        self.has_exceptions = any(not leaves_out for _, leaves_out in self._patterns)

    @classmethod
    def parse(cls, data: bytes, name: str = NAME) -> Ignored:
        """Read the file. Raises BuildError, with the line, for a malformed pattern."""
        found = []
        for number, line in enumerate(data.decode("utf-8-sig", "surrogateescape").splitlines(), 1):
            pattern = line.strip()
            if line.startswith("#") or not pattern:
                continue
            leaves_out = not pattern.startswith("!")
            pattern = pattern.removeprefix("!").strip()
            if not pattern:
                raise BuildError(f"{name}:{number}: '!' without a pattern")
            pattern = posixpath.normpath(pattern).lstrip("/")
            if pattern in ("", "."):
                continue
            found.append((compiled(pattern, f"{name}:{number}"), leaves_out))
            if len(found) > _MOST_PATTERNS:
                raise BuildError(f"{name}: more than {_MOST_PATTERNS} patterns")
        return cls(found)

    def __contains__(self, path: str) -> bool:
        """Return True if the path, relative to the context, is left out."""
        return bool(self._patterns) and self._match(path)[0]

    # Returns also which patterns match. One that could not change the result was not tried, as in BuildKit.
    def _match(self, path: str) -> tuple[bool, tuple[bool, ...]]:
        known = self._matches.get(path)
        if known is not None:
            return known
        parent = posixpath.dirname(path)
        above = self._match(parent)[1] if parent else (False,) * len(self._patterns)
        result, found = False, []
        for (pattern, leaves_out), matched in zip(self._patterns, above, strict=True):
            matches = matched or (leaves_out != result and pattern.fullmatch(path) is not None)
            found.append(matches)
            if matches:
                result = leaves_out
        if len(self._matches) >= _MOST_KNOWN:
            self._matches.clear()
        self._matches[path] = result, tuple(found)
        return self._matches[path]


@lru_cache(maxsize=1024)
def compiled(pattern: str, place: str) -> re.Pattern[str]:
    """Return a pattern as a regular expression for a whole path.

    Raises BuildError, which begins with ``place``, for a malformed pattern, or one of too many stars: its expression
    would take too long.
    """
    if pattern.count("*") > _MOST_STARS:
        raise BuildError(f"{place}: more than {_MOST_STARS} stars in a pattern (got {pattern[:80]!r})")
    text, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**", at):
            at += 2
            if pattern.startswith("/", at):
                at += 1
                text += "(?:.*/)?"
            else:
                text += ".*"
            continue
        character = pattern[at]
        at += 1
        if character == "*":
            text += "[^/]*"
        elif character == "?":
            text += "[^/]"
        elif character == "[":
            end = pattern.find("]", at + 1)
            members = pattern[at:end]
            if end < 0 or members in ("^", "!"):
                raise BuildError(f"{place}: '[' without an end (got {pattern[:80]!r})")
            negated = members[0] == "^"
            escaped = members[negated:].replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
            text += f"(?!/)[{'^' if negated else ''}{escaped}]"
            at = end + 1
        elif character == "\\" and at < len(pattern):
            text += re.escape(pattern[at])
            at += 1
        else:
            text += re.escape(character)
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise BuildError(f"{place}: malformed pattern {pattern[:80]!r}: {error}") from None
