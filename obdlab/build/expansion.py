"""Variables and quotes in the arguments of instructions.

Source: Dockerfile reference, "Environment replacement": $name, ${name} and its forms :- - :+ + :? ?; single quotes
keep all, double quotes all but $ and the escape character. Pattern forms (# % /) are refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_MOST_NESTED = 32
#: Most characters of an expanded text: nested defaults and repeated variables must not grow without a bound.
MOST_LENGTH = 1 << 20


class ExpansionError(ValueError):
    """A text has unbalanced quotes or braces, a form that is not supported, or a variable that must be set."""


def expand(text: str, variables: Mapping[str, str], escape: str = "\\") -> str:
    """Return ``text`` with its variables replaced and its quotes taken away. Raises ExpansionError."""
    return "".join(_Reader(text, variables, escape).read_to(""))


def expand_document(text: str, variables: Mapping[str, str], escape: str = "\\") -> str:
    """Return the text of a here-document with its variables replaced; quotes stay. Raises ExpansionError."""
    return "".join(_Reader(text, variables, escape, keeps_quotes=True).read_to(""))


def split(text: str, escape: str = "\\") -> list[str]:
    """Return the words of a text, quotes and variables in them left as they are. Raises ExpansionError."""
    words: list[str] = []
    word, quote, at = "", "", 0
    while at < len(text):
        character = text[at]
        if character == escape and quote != "'" and at + 1 < len(text):
            word += text[at : at + 2]
            at += 2
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in " \t":
            if word:
                words.append(word)
            word = ""
            at += 1
            continue
        word += character
        at += 1
    if quote:
        raise ExpansionError(f"quote {quote} without an end")
    return [*words, word] if word else words


def pairs(text: str, escape: str = "\\") -> list[tuple[str, str]]:
    """Return the pairs of "name=value name=value", or the one of the old form "name the whole rest", unexpanded.

    Raises ExpansionError.
    """
    words = split(text, escape)
    if words and "=" not in words[0]:
        name, *rest = text.split(None, 1)
        if not rest:
            raise ExpansionError(f"{name!r} has no value (wanted name=value)")
        return [(name, rest[0])]
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ExpansionError(f"got {word!r}, wanted name=value")
        found.append((name, value))
    return found


class _Reader:
    def __init__(self, text: str, variables: Mapping[str, str], escape: str, *, keeps_quotes: bool = False) -> None:
        self._keeps_quotes = keeps_quotes
        self._text = text
        self._variables = variables
        self._escape = escape
        self._at = 0
        self._nested = 0
        self._length = 0

    # Reads up to one of the characters ``end`` outside of quotes, which it leaves, or up to the text's end.
    def read_to(self, end: str) -> list[str]:
        parts: list[str] = []
        while self._at < len(self._text):
            character = self._text[self._at]
            if end and character in end:
                return parts
            self._at += 1
            if character == "$":
                parts.append(self._variable())
            elif self._keeps_quotes and (character != self._escape or self._text[self._at : self._at + 1] != "$"):
                parts.append(character)
            elif character == "'":
                parts.append(self._quoted())
            elif character == '"':
                parts += self._in_double_quotes()
            elif character == self._escape and self._at < len(self._text):
                parts.append(self._text[self._at])
                self._at += 1
            else:
                parts.append(character)
        if end:
            raise ExpansionError(f"{self._text[:80]!r}: brace without an end")
        return parts

    def _quoted(self) -> str:
        end = self._text.find("'", self._at)
        if end < 0:
            raise ExpansionError(f"{self._text[:80]!r}: quote ' without an end")
        found = self._text[self._at : end]
        self._at = end + 1
        return found

    def _in_double_quotes(self) -> list[str]:
        parts: list[str] = []
        while self._at < len(self._text):
            character = self._text[self._at]
            self._at += 1
            if character == '"':
                return parts
            if character == "$":
                parts.append(self._variable())
            elif character == self._escape and self._text[self._at : self._at + 1] in ('"', "$", self._escape):
                parts.append(self._text[self._at])
                self._at += 1
            else:
                parts.append(character)
        raise ExpansionError(f'{self._text[:80]!r}: quote " without an end')

    def _variable(self) -> str:
        braced = self._text[self._at : self._at + 1] == "{"
        found = _NAME.match(self._text, self._at + braced)
        if found is None:
            if braced:
                raise ExpansionError(f"{self._text[:80]!r}: malformed ${{...}}")
            return "$"
        self._at = found.end()
        value = self._variables.get(found[0])
        if braced:
            value = self._braced(found[0], value)
        value = value or ""
        self._length += len(value)
        if self._length > MOST_LENGTH:
            raise ExpansionError(f"expands to more than {MOST_LENGTH} characters")
        return value

    def _braced(self, name: str, value: str | None) -> str | None:
        form = re.compile(r":?[-+?]").match(self._text, self._at)
        if form is None:
            if self._text[self._at : self._at + 1] != "}":
                raise ExpansionError(f"${{{name}...}}: got {self._text[self._at :][:20]!r}, wanted }}, :-, :+ or :?")
            self._at += 1
            return value
        self._at = form.end()
        self._nested += 1
        if self._nested > _MOST_NESTED:
            raise ExpansionError(f"braces nested more than {_MOST_NESTED} deep")
        word = "".join(self.read_to("}"))
        self._nested -= 1
        self._at += 1
        is_set = bool(value) if form[0][0] == ":" else value is not None
        match form[0][-1]:
            case "-":
                return value if is_set else word
            case "+":
                return word if is_set else ""
        if not is_set:
            raise ExpansionError(f"{name}: {word or 'is not set'}")
        return value
