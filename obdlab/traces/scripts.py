"""Names in texts of an image: commands of shell scripts, and files that configurations include.

Nothing is run and nothing is expanded: a word that no variable is part of is taken as it stands. A wrong guess costs
a lookup, as names that the image lacks are left out.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Longer texts are read up to here.
MAX_TEXT = 128 << 10
_MAX_COMMANDS = 256
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
_BEGIN = re.compile(r"(?:^|[;&|({`]|\$\()\s*", re.MULTILINE)
_KEYWORD = re.compile(r"(?:if|then|elif|else|do|while|until|!|\{)\s+")
_ASSIGNED = re.compile(r"[A-Za-z_]\w*=(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s;&|()]*)\s+")
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_CONTINUED = re.compile(r"\\\n")
_PATH = re.compile(r"(?:^|\s)(?:export\s+)?PATH=[\"']?([^\s\"';]+)", re.MULTILINE)
_NAME = re.compile(rb"[A-Za-z0-9_.+*/@%,-]+")
_PLAIN = re.compile(r"[\w./+:=,@%-]+")


def commands_in(text: str) -> list[list[str]]:
    """Return the words of each command in a shell script, built-in ones left out except "." and "source"."""
    text = _CONTINUED.sub(" ", _COMMENT.sub("", text[:MAX_TEXT]))
    found: list[list[str]] = []
    for begin in _BEGIN.finditer(text):
        line = text[begin.end() : text.find("\n", begin.end()) % (len(text) + 1)][:4096]
        while (keyword := _KEYWORD.match(line) or _ASSIGNED.match(line)) is not None:
            line = line[keyword.end() :]
        words = _words(re.split(r"[;&|()`<>]", line, maxsplit=1)[0])
        if words and words[0] in (".", "source") and len(words) > 1:
            found.append(["source", words[1]])
        elif words and _PLAIN.fullmatch(words[0]) and words[0] not in _BUILT_IN:
            found.append(words)
        if len(found) >= _MAX_COMMANDS:
            break
    return found


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # a quote that a later line closes
        return line.replace('"', "").replace("'", "").split()


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


def search_paths(text: str) -> list[str]:
    """Return the directories that a script adds to PATH."""
    return [
        each for match in _PATH.finditer(text[:MAX_TEXT]) for each in match[1].split(":")[:16] if each.startswith("/")
    ]


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
