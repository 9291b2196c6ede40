"""containerd's filter language, as in List and its clients.

A filter is a comma-separated list of selectors that must all hold; several filters are alternatives::

    selector  := fieldpath [("==" | "!=" | "~=") value]
    fieldpath := field ("." field)*
    field     := quoted | [A-Za-z0-9_]+
    value     := quoted | anything up to a comma or a blank

A selector without operator matches if the field is there. ``~=`` searches a regular expression, whose quotes may
also be ``/`` or ``|``. Its syntax is RE2, as in Go, so patterns take linear time. Fields of a snapshot are
``name``, ``parent``, ``kind`` and ``labels.<key>``; keys with dots are quoted, ``labels."a.b"``. (containerd, package
filters.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from obdlab.snapshotter.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from obdlab.snapshotter.store import Snapshot

_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"[=!~]+")
_VALUE = re.compile(r"[^\s,]+")
_BLANKS = re.compile(r"\s*")
_SIMPLE_ESCAPES = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"', "'": "'",
}  # fmt: skip
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
# One call needs some tens of bytes. Matching holds the interpreter lock, so other calls wait for it.
_MAX_TEXT = 64 << 10
_MAX_SELECTORS = 1000
_MAX_PATTERN_MEMORY = 1 << 20


# Imported late: few filters have a pattern, and re2 takes 2.4 MiB.
@cache
def _engine() -> tuple[Any, Any]:
    import re2

    options = re2.Options()
    options.max_mem = _MAX_PATTERN_MEMORY
    options.log_errors = False
    return re2, options


@dataclass(frozen=True, slots=True)
class Selector:
    """One condition on one field. ``operator`` is ``==``, ``!=``, ``~=``, or empty for presence."""

    path: tuple[str, ...]
    operator: str
    value: str
    pattern: Any = None

    def matches(self, snapshot: Snapshot) -> bool:
        """Return True if the snapshot meets the condition."""
        found = _field_of(snapshot, self.path)
        if self.operator == "":
            return found is not None
        if self.operator == "==":
            return found == self.value
        if self.operator == "!=":
            return found != self.value
        assert self.pattern is not None
        return self.pattern.search(found or "") is not None


def compile_filters(filters: Sequence[str]) -> Callable[[Snapshot], bool]:
    """Return the predicate of these filters; an empty list matches everything. Raises InvalidArgumentError."""
    if sum(map(len, filters)) > _MAX_TEXT:
        raise InvalidArgumentError(f"filters: too long (got {sum(map(len, filters))}, wanted at most {_MAX_TEXT})")
    alternatives = [parse_filter(text) for text in filters]
    count = sum(max(1, len(selectors)) for selectors in alternatives)
    if count > _MAX_SELECTORS:
        raise InvalidArgumentError(f"filters: too many conditions (got {count}, wanted at most {_MAX_SELECTORS})")
    if not alternatives:
        return lambda snapshot: True
    return lambda snapshot: any(all(s.matches(snapshot) for s in selectors) for selectors in alternatives)


def parse_filter(text: str) -> tuple[Selector, ...]:
    """Return the selectors of one filter; an empty text has no selectors. Raises InvalidArgumentError."""
    return _Parser(text).filter() if text else ()


def _field_of(snapshot: Snapshot, path: tuple[str, ...]) -> str | None:
    match path[0]:
        case "name":
            return snapshot.key
        case "parent":
            return snapshot.parent
        case "kind":
            return snapshot.kind.name.lower()
        case "labels":
            return snapshot.labels.get(".".join(path[1:]))
    return None


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def filter(self) -> tuple[Selector, ...]:
        selectors = [self._selector()]
        while self._peek() == ",":
            self._at += 1
            selectors.append(self._selector())
        if self._peek():
            raise self._error("a comma or the end")
        return tuple(selectors)

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._peek() == ".":
            self._at += 1
            path.append(self._field())
        if self._peek() in ("", ","):
            return Selector(tuple(path), "", "")
        start = self._at
        operator = self._take(_OPERATOR)
        if operator not in ("==", "!=", "~="):
            self._at = start
            raise self._error('an operator ("==", "!=" or "~=")')
        value = self._value(alternative_quotes=operator == "~=")
        pattern = self._pattern(value) if operator == "~=" else None
        return Selector(tuple(path), operator, value, pattern)

    def _field(self) -> str:
        if self._peek() in ('"', "/", "|"):
            return self._quoted(alternative_quotes=False)
        field = self._take(_FIELD)
        if not field:
            raise self._error("a field name")
        return field

    def _value(self, *, alternative_quotes: bool) -> str:
        if self._peek() in ('"', "/", "|"):
            return self._quoted(alternative_quotes=alternative_quotes)
        value = self._take(_VALUE)
        if not value:
            raise self._error("a value")
        return value

    def _quoted(self, *, alternative_quotes: bool) -> str:
        quote = self._text[self._at]
        if quote != '"' and not alternative_quotes:
            raise self._error('a value in "..." (other quotes are for regular expressions)')
        start = self._at
        self._at += 1
        parts: list[str] = []
        while (char := self._text[self._at : self._at + 1]) != quote:
            if char in ("", "\n"):
                self._at = start
                raise self._error(f"a closing {quote}")
            self._at += 1
            parts.append(self._escape(quote) if char == "\\" else char)
        self._at += 1
        return "".join(parts)

    def _escape(self, quote: str) -> str:
        char = self._text[self._at : self._at + 1]
        if quote != '"':
            # A regular expression keeps its backslashes; only the one before its own quote goes.
            return self._advance(1) if char == quote else "\\"
        if char in _SIMPLE_ESCAPES:
            self._advance(1)
            return _SIMPLE_ESCAPES[char]
        if char in _HEX_DIGITS:
            self._advance(1)
            return self._character(self._advance(_HEX_DIGITS[char]), 16, _HEX_DIGITS[char])
        if char and char in "01234567":
            return self._character(self._advance(3), 8, 3)
        raise self._error("an escape Go knows")

    def _character(self, digits: str, base: int, count: int) -> str:
        allowed = "0123456789abcdefABCDEF" if base == 16 else "01234567"
        if len(digits) == count and all(digit in allowed for digit in digits):
            code = int(digits, base)
            if code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
                return chr(code)
        raise self._error(f"{count} digits of a character")

    def _advance(self, count: int) -> str:
        text = self._text[self._at : self._at + count]
        self._at += count
        return text

    def _pattern(self, value: str) -> Any:
        re2, options = _engine()
        try:
            return re2.compile(value, options)
        except re2.error as error:
            cause = error.args[0].decode(errors="replace") if error.args else "no reason given"
            raise InvalidArgumentError(f"filter {self._text!r}: bad regular expression ({cause})") from error

    def _peek(self) -> str:
        self._take(_BLANKS)
        return self._text[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[str]) -> str:
        if pattern is not _BLANKS:
            self._take(_BLANKS)
        found = pattern.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found.group()

    def _error(self, wanted: str) -> InvalidArgumentError:
        rest = self._text[self._at : self._at + 20]
        return InvalidArgumentError(
            f"filter {self._text!r}: wrong at character {self._at} (got {rest!r}, wanted {wanted})"
        )
