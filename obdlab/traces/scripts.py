"""Names in texts of an image: commands of shell scripts, and files that configurations include.

Nothing is run: of a script, each command is taken as if it were reached, with the values that assignments before it
may have given its variables. A wrong guess costs a lookup, as names that the image lacks are left out.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from obdlab.traces.shellvariables import Variables, raw_words, word_end

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Longer texts are read up to here.
MAX_TEXT = 128 << 10
_MAX_COMMANDS = 256
_MAX_WORDS = 256
# The words of a command that may name programs: those behind wrappers.
_HEAD = 4
_MAX_LOOP = 16
_MAX_LINE = 4096
_MAX_NAMES = 1024
#: Programs that run the command in their arguments.
_WRAPPERS = frozenset(
    (
        *("catchsegv", "chpst", "chroot", "command", "dumb-init", "env", "eval", "exec", "gosu", "nice", "nohup"),
        *("runuser", "setpriv", "setsid", "stdbuf", "su-exec", "sudo", "time", "timeout", "tini", "tini-static"),
        "unshare",
    )
)
_SHELLS = re.compile(r"(?:ba|da|a|k|z|mk)?sh")
_BUILT_IN = frozenset((
    *(".", ":", "[", "alias", "bg", "bind", "break", "builtin", "caller", "case", "cd", "compgen", "complete"),
    *("continue", "declare", "dirs", "disown", "do", "done", "echo", "elif", "else", "enable", "esac", "exit"),
    *("export", "false", "fc", "fg", "fi", "for", "function", "getopts", "hash", "help", "history", "if", "in"),
    *("jobs", "kill", "let", "local", "logout", "mapfile", "popd", "printf", "pushd", "pwd", "read"),
    *("readarray", "readonly", "return", "select", "set", "shift", "shopt", "source", "suspend", "test"),
    *("then", "times", "trap", "true", "type", "typeset", "ulimit", "umask", "unalias", "unset", "until"),
    *("wait", "while"),
))  # fmt: skip
# Where a command may begin: a line, a list or pipe, a group, a substitution.
_BEGIN = re.compile(r"(?:^|[;&|(`]|(?<!\$)\{)\s*", re.MULTILINE)
_KEYWORD = re.compile(r"(?:if|then|elif|else|do|while|until|!|\{)\s+")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_DECLARING = re.compile(r"(?:export|readonly|local|declare|typeset)\s+(?:-\w+\s+)*")
_DEFAULT = re.compile(r":\s+[\"']?\$\{")
_LOOP = re.compile(r"for\s+([A-Za-z_]\w*)\s+in\s+")
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_CONTINUED = re.compile(r"\\\n")
_NAME = re.compile(rb"[A-Za-z0-9_.+*/@%,-]+")
_PLAIN = re.compile(r"[\w./+:=,@%-]+")


def commands_in(text: str, variables: Variables | None = None) -> Iterator[list[str]]:
    """Yield the words of each command in a shell script, built-in ones left out except "." (yielded as "source").

    Assignments change ``variables`` on the way. To know those of a sourced file, the caller looks through that file
    before it takes the next command.
    """
    variables = Variables({}) if variables is None else variables
    text = _CONTINUED.sub(" ", _COMMENT.sub("", text[:MAX_TEXT]))
    count = 0
    for begin in _BEGIN.finditer(text):
        line = text[begin.end() : text.find("\n", begin.end()) % (len(text) + 1)][:_MAX_LINE]
        if not variables.spend(len(line)):
            return
        for words in _commands_at(line, variables):
            count += 1
            if count > _MAX_COMMANDS:
                return
            yield words


# Yields the command that a line begins with, once for each value that one of its first words may have.
def _commands_at(line: str, variables: Variables) -> Iterator[list[str]]:
    while (keyword := _KEYWORD.match(line)) is not None:
        line = line[keyword.end() :]
    if (loop := _LOOP.match(line)) is not None:
        for word in reversed(raw_words(line[loop.end() :], _MAX_LOOP)):
            variables.assign(loop[1], word)
        return
    if (declaring := _DECLARING.match(line)) is not None:
        line = line[declaring.end() :]
    elif _DEFAULT.match(line) is not None:
        for word in raw_words(line, _MAX_LOOP)[1:]:
            variables.expanded(word)
        return
    while (assigned := _ASSIGNED.match(line)) is not None:
        end = word_end(line, assigned.end())
        value = line[assigned.end() : end]
        variables.assign(assigned[1], f"${{{assigned[1]}}}{value}" if assigned[2] else value)
        line = line[end:].lstrip(" \t")
    raw = raw_words(line)
    if declaring is not None or not raw:
        return
    sourcing = raw[0] in (".", "source")
    if sourcing:
        for name in variables.expanded(raw[1]) if len(raw) > 1 else ():
            yield ["source", name]
        return
    values = [variables.expanded(word) for word in raw]
    if not values[0]:
        return
    first = values[:_HEAD]
    rest = [part for number, each in enumerate(values) if number >= _HEAD for part in _parts(raw, number, each)]
    for variant in range(max(map(len, first))):
        head = [
            part
            for number, each in enumerate(first)
            for part in _parts(raw, number, each[min(variant, len(each) - 1) :][:1])
        ]
        words = [*head, *rest][:_MAX_WORDS]
        if words and _PLAIN.fullmatch(words[0]) and words[0] not in _BUILT_IN:
            # What eval is given is read a second time: it loses its inner quotes.
            yield [word.replace('"', "").replace("'", "") for word in words] if words[0] == "eval" else words


# Variables hold several words or none. A script for "-c" stays one.
def _parts(raw: list[str], number: int, values: list[str]) -> Iterator[str]:
    for value in values:
        if "$" in raw[number] and (number == 0 or raw[number - 1] != "-c"):
            yield from value.split()
        else:
            yield value


def unwrapped(words: list[str]) -> list[list[str]]:
    """Return the commands that one command line runs: itself, and those that its wrappers are given."""
    found = [words]
    while len(words) > 1 and os.path.basename(words[0]) in _WRAPPERS and len(found) < 8:
        # An option's argument or a user's name is taken for a program as well: the image seldom has one of the name.
        words = words[1:]
        while words and (words[0].startswith("-") or "=" in words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


def is_wrapper(name: str) -> bool:
    """Return True if the program runs a command that it is given."""
    return name in _WRAPPERS


def is_shell(name: str) -> bool:
    """Return True for the name of a shell's program."""
    return _SHELLS.fullmatch(name) is not None


def names_in(text: bytes) -> Iterator[bytes]:
    """Yield words of a configuration that can name files: absolute, or relative with a dot or a slash in it.

    Comments are left out. Patterns with "*" are yielded as they are.
    """
    count = 0
    for line in text[:MAX_TEXT].splitlines():
        stripped = line.strip()
        if stripped.startswith((b"#", b";", b"//")):
            continue
        for match in _NAME.finditer(stripped):
            word = match[0].rstrip(b".,")
            if (b"/" in word or b"." in word) and len(word) > 2 and not word.replace(b".", b"").isdigit():
                count += 1
                if count > _MAX_NAMES:
                    return
                yield word
