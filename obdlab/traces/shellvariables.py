"""Variables of shell scripts, without running them: the values that a script may give them, and words that use them.

A script's branches are not decided: a variable has several values, the newest first, and a word stands for each
combination. Of command substitutions, those are known that make a path of a path. A word that depends on anything
else (arguments, output of programs) has no value. A wrong value costs a lookup of a name that the image lacks.

Scripts are hostile: values, their number and length, and the depth of nesting are bounded.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_MOST_VARIABLES = 1024
# Values of a variable, and of a word.
_MOST_VALUES = 4
_MOST_WORDS = 8
_MAX_VALUE = 4096
_MAX_DEPTH = 8
#: Characters looked through, and 64 of those put together, for all scripts of one start.
MAX_STEPS = 1 << 23
_NAME = re.compile(r"[A-Za-z_]\w*")
_SPECIAL = re.compile(r"[0-9@*#?$!-]")
_OPERATOR = re.compile(r":?[-=+?]|%%?|##?")
_PLAIN = re.compile(r"[^\\\"`$']+|'")
_END = frozenset(" \t\n;&|()<>")


class Variables:
    """The variables of one start. ``environment`` has those of the image's configuration."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._values: dict[str, tuple[str, ...]] = {}
        self._left = MAX_STEPS
        for name, value in list(environment.items())[:_MOST_VARIABLES]:
            self._values[name] = (value[:_MAX_VALUE],)
        self._given = frozenset(self._values)

    def spend(self, steps: int) -> bool:
        """Return False if more was looked through than a start is worth."""
        self._left -= steps
        return self._left >= 0

    def environment(self) -> dict[str, str]:
        """Return one value of each variable that has any."""
        return {name: values[0] for name, values in self._values.items() if values}

    def values(self, name: str) -> tuple[str, ...]:
        """Return the possible values, the newest first; () if they are unknown, and "" for a variable never set."""
        return self._values.get(name, ("",))

    def assign(self, name: str, word: str) -> None:
        """Add the values of a word, as written in a script, to a variable's. The older ones stay possible.

        A value of the environment stays the first: scripts mostly assign to such a variable if it is unset.
        """
        found = self.expanded(word)
        old = self._values.get(name, ())
        if name in self._given:
            found = [*old[:1], *found]
        if name in self._values or len(self._values) < _MOST_VARIABLES:
            self._values[name] = tuple(dict.fromkeys((*found, *old)))[:_MOST_VALUES]

    def assign_default(self, name: str, word: str) -> None:
        """Give a variable that is unset or empty the values of a word."""
        if not any(self._values.get(name, ())):
            self.assign(name, word)

    def name_script(self, path: str) -> None:
        """Set the path that ``$0`` stands for."""
        self._values["0"] = (path[:_MAX_VALUE],)

    def expanded(self, word: str) -> list[str]:
        """Return the possible values of a word as written, without its quotes and with variables replaced."""
        return self._expanded(word[:_MAX_VALUE], 0)

    def _expanded(self, word: str, depth: int) -> list[str]:
        found = [""]
        at, quoted = 0, False
        if depth > _MAX_DEPTH or not self.spend(len(word) + 1):
            return []
        while at < len(word) and found:
            character = word[at]
            if character == "'" and not quoted:
                end = word.find("'", at + 1) % (len(word) + 1)
                parts, at = [word[at + 1 : end]], end + 1
            elif character == '"':
                quoted, parts, at = not quoted, [""], at + 1
            elif character == "\\":
                parts, at = [word[at + 1 : at + 2]], at + 2
            elif character == "`":
                end = word.find("`", at + 1) % (len(word) + 1)
                parts, at = self._substituted(word[at + 1 : end], depth), end + 1
            elif character == "$":
                parts, at = self._dollar(word, at + 1, depth)
            else:
                match = _PLAIN.match(word, at)
                assert match is not None
                parts, at = [match[0]], match.end()
            joined = dict.fromkeys((one + other)[:_MAX_VALUE] for one in found for other in parts)
            if not self.spend(sum(map(len, joined)) // 64):
                return []
            found = list(joined)[:_MOST_WORDS]
        return found

    # Returns the values of the expansion behind a "$", and the position behind it.
    def _dollar(self, word: str, at: int, depth: int) -> tuple[list[str], int]:
        if word.startswith("((", at):
            return [], closing(word, at + 1)
        if word.startswith("(", at):
            end = closing(word, at)
            return self._substituted(word[at + 1 : end - 1], depth), end
        if word.startswith("{", at):
            end = closing(word, at)
            return self._parameter(word[at + 1 : end - 1], depth), end
        match = _NAME.match(word, at) or _SPECIAL.match(word, at)
        if match is None:
            return ["$"], at
        return self._value(match[0]), match.end()

    def _value(self, name: str) -> list[str]:
        if _SPECIAL.fullmatch(name[:1]):
            return list(self._values.get(name, ())) if name == "0" else []
        return list(self.values(name))

    def _parameter(self, text: str, depth: int) -> list[str]:
        match = _NAME.match(text) or _SPECIAL.match(text)
        if match is None:
            return []
        name, rest = match[0], text[match.end() :]
        values = self._value(name)
        operator = _OPERATOR.match(rest)
        if operator is None:
            return [] if rest else values
        sign, other = operator[0], rest[operator.end() :]
        if sign.endswith("?"):
            return values
        if sign.endswith("+"):
            return self._expanded(other, depth + 1) if any(values) else [""]
        if sign.endswith(("-", "=")):
            known = [value for value in values if value]
            if not known:
                known = self._expanded(other, depth + 1)
                if sign.endswith("=") and _NAME.fullmatch(name) and len(self._values) < _MOST_VARIABLES:
                    self._values[name] = tuple(known[:_MOST_VALUES])
            return known
        return [found for value in values for found in _cut(value, sign, other)]

    # Returns the values of a command substitution that makes a path of a path: dirname, readlink, cd and pwd, ...
    def _substituted(self, command: str, depth: int) -> list[str]:
        words = raw_words(command.strip())
        if len(words) < 2:
            return []
        name = os.path.basename(words[0])
        if name in ("command", "which", "type"):
            return self._expanded(words[-1], depth + 1)
        if name == "echo":
            return [] if "|" in command else self._expanded(words[-1], depth + 1)
        # Options come before a path, and a suffix comes behind it (basename).
        paths = [value for word in words[1:] for value in self._expanded(word, depth + 1) if "/" in value][
            :_MOST_WORDS
        ]
        if name == "dirname":
            return [os.path.dirname(path.rstrip("/")) or "/" for path in paths]
        if name == "basename":
            return [os.path.basename(path.rstrip("/")) for path in paths]
        # Of other programs and functions that are given one absolute path, it is taken for their answer.
        return [os.path.normpath(path) for path in paths if path.startswith("/")]


def _cut(value: str, sign: str, pattern: str) -> list[str]:
    if sign == "%" and pattern == "/*":
        return [value.rpartition("/")[0] if "/" in value else value]
    if sign == "##" and pattern == "*/":
        return [value.rpartition("/")[2]]
    if re.search(r"[*?\[$`]", pattern):
        return []
    pattern = pattern.replace('"', "").replace("'", "")
    return [value.removesuffix(pattern) if sign[0] == "%" else value.removeprefix(pattern)]


def closing(text: str, at: int) -> int:
    """Return the position behind the bracket that closes the one at ``at``; the text's end if none does."""
    opened = text[at]
    closed = ")" if opened == "(" else "}"
    depth = 0
    while at < len(text):
        character = text[at]
        if character == "\\":
            at += 1
        elif character == "'":
            at = text.find("'", at + 1) % (len(text) + 1)
        elif character == opened:
            depth += 1
        elif character == closed:
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return len(text)


def word_end(text: str, at: int) -> int:
    """Return the end of the word that begins at ``at``: quotes and substitutions belong to it as a whole."""
    quoted = False
    while at < len(text):
        character = text[at]
        if character == "\\":
            at += 2
        elif character == "'" and not quoted:
            at = text.find("'", at + 1) % (len(text) + 1) + 1
        elif character == '"':
            quoted = not quoted
            at += 1
        elif character == "`":
            at = text.find("`", at + 1) % (len(text) + 1) + 1
        elif character == "$" and text[at + 1 : at + 2] in ("(", "{"):
            at = closing(text, at + 1)
        elif character in _END and not quoted:
            break
        else:
            at += 1
    return min(at, len(text))


def raw_words(line: str, most: int = 256) -> list[str]:
    """Return the words of a command as written, up to its end or its first redirection."""
    found: list[str] = []
    at = 0
    while len(found) < most:
        while line[at : at + 1] in (" ", "\t"):
            at += 1
        end = word_end(line, at)
        if end == at:
            break
        found.append(line[at:end])
        at = end
    return found
