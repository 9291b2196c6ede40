"""A Dockerfile as a list of instructions.

Source: Dockerfile reference, and BuildKit's parser where the reference is silent: parser directives, comments and
blank lines within continued lines, exec forms, here-documents. The instructions that a build follows are listed
here: a file with another one is refused, by its line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.build.expansion import ExpansionError, pairs, split
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Instructions that are followed.
INSTRUCTIONS = frozenset(
    [
        "ADD",
        "ARG",
        "CMD",
        "COPY",
        "ENTRYPOINT",
        "ENV",
        "EXPOSE",
        "FROM",
        "HEALTHCHECK",
        "LABEL",
        "MAINTAINER",
        "RUN",
        "SHELL",
        "STOPSIGNAL",
        "USER",
        "VOLUME",
        "WORKDIR",
    ]
)
#: Flags of the instructions that have any.
_FLAGS = {
    "ADD": ("chown", "chmod", "link"),
    "COPY": ("from", "chown", "chmod", "link"),
    "FROM": ("platform",),
    "HEALTHCHECK": ("interval", "timeout", "start-period", "start-interval", "retries"),
    "RUN": ("mount", "network"),
}
_WITH_EXEC_FORM = frozenset({"ADD", "CMD", "COPY", "ENTRYPOINT", "RUN", "SHELL", "VOLUME"})
_WITH_HEREDOCS = frozenset({"ADD", "COPY", "RUN"})
#: Most bytes of a Dockerfile, and most instructions in it.
MOST_BYTES = 1 << 20
_MOST_INSTRUCTIONS = 2000

_DIRECTIVE = re.compile(r"#\s*([A-Za-z][A-Za-z0-9]*)\s*=\s*(.+?)\s*")
_HEREDOC = re.compile(r"""\d*<<(-?)(["']?)([A-Za-z_][A-Za-z0-9_.]*)\2""", re.ASCII)
_FLAG = re.compile(r"--([a-z-]+)(?:=(\S*))?(?:\s+|$)", re.ASCII)


class BuildError(ObdlabError, code="build"):
    """A build cannot be done as its Dockerfile says. The message begins with the file and the line."""


@dataclass(frozen=True, slots=True)
class Heredoc:
    """A here-document: its text, and whether variables in it are expanded (its name was not quoted)."""

    name: str
    text: str
    expands: bool


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. ``words`` is its exec form, a JSON array; None in the shell form, which is ``text``."""

    name: str
    text: str
    words: tuple[str, ...] | None
    flags: tuple[tuple[str, str], ...]
    heredocs: tuple[Heredoc, ...]
    #: Where it stands: "Dockerfile:7".
    place: str
    #: As it was written, on one line.
    source: str

    def error(self, text: str) -> BuildError:
        """Return an error that names file and line."""
        return BuildError(f"{self.place}: {self.name}: {text}")

    def flag(self, name: str) -> str:
        """Return the value of a flag; "" if it is missing."""
        return next((value for key, value in self.flags if key == name), "")

    def check_flags(self, *known: str) -> None:
        """Raise BuildError for a flag that is not in ``known``, or is given twice."""
        names = [name for name, _ in self.flags]
        for name in names:
            if name not in known:
                wanted = ", ".join(f"--{each}" for each in known) or "no flags"
                raise self.error(f"flag --{name} is not supported (wanted {wanted})")
            if names.count(name) > 1 and name != "mount":
                raise self.error(f"flag --{name} is given twice")


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """The instructions of a file, and its escape character."""

    instructions: tuple[Instruction, ...]
    escape: str = "\\"


def parse(data: bytes, name: str = "Dockerfile") -> Dockerfile:
    """Read a Dockerfile. Raises BuildError, with the line, for one that is malformed or has unknown instructions."""
    if len(data) > MOST_BYTES:
        raise BuildError(f"{name}: too large (got {len(data)} bytes, wanted at most {MOST_BYTES})")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BuildError(f"{name}: not UTF-8 (byte {error.start})") from None
    if "\0" in text:
        raise BuildError(f"{name}: holds a zero byte")
    lines = text.replace("\r\n", "\n").split("\n")
    escape, begin = _directives(lines, name)
    found = tuple(_instructions(lines, begin, escape, name))
    if not found:
        raise BuildError(f"{name}: has no instructions")
    if len(found) > _MOST_INSTRUCTIONS:
        raise BuildError(f"{name}: too many instructions (got {len(found)}, wanted at most {_MOST_INSTRUCTIONS})")
    return Dockerfile(found, escape)


# Parser directives are comments before everything else. Only "escape" changes how the file is read.
def _directives(lines: list[str], name: str) -> tuple[str, int]:
    escape = "\\"
    for number, line in enumerate(lines):
        found = _DIRECTIVE.fullmatch(line.strip())
        if found is None:
            return escape, number
        if found[1].lower() == "escape":
            if found[2] not in ("\\", "`"):
                raise BuildError(f"{name}:{number + 1}: escape: got {found[2]!r}, wanted \\ or `")
            escape = found[2]
    return escape, len(lines)


def _instructions(lines: list[str], at: int, escape: str, name: str) -> Iterator[Instruction]:
    continued = re.compile(rf"(?<!{re.escape(escape)}){re.escape(escape)}[ \t]*$")
    while at < len(lines):
        first, line = at, lines[at].strip()
        at += 1
        if not line or line.startswith("#"):
            continue
        parts = []
        line = lines[first].lstrip()
        while (end := continued.search(line)) is not None:
            parts.append(line[: end.start()])
            while at < len(lines) and (not lines[at].strip() or lines[at].lstrip().startswith("#")):
                at += 1
            if at == len(lines):
                line = ""
                break
            line = lines[at]
            at += 1
        parts.append(line)
        place = f"{name}:{first + 1}"
        whole = "".join(parts).strip()
        if not whole:  # continued lines with nothing in them
            continue
        keyword = whole.split(None, 1)[0].upper()
        heredocs: list[Heredoc] = []
        if keyword in _WITH_HEREDOCS:
            for found in _heredocs_in(whole, escape):
                at, heredoc = _heredoc(lines, at, found, place)
                heredocs.append(heredoc)
        yield _instruction(whole, tuple(heredocs), place, escape)


# Their marks are whole words outside of quotes.
def _heredocs_in(text: str, escape: str) -> list[re.Match[str]]:
    try:
        words = split(text, escape) if "<<" in text else []
    except ExpansionError:
        return []
    return [found for word in words if (found := _HEREDOC.fullmatch(word)) is not None]


def _heredoc(lines: list[str], at: int, found: re.Match[str], place: str) -> tuple[int, Heredoc]:
    body: list[str] = []
    for number in range(at, len(lines)):
        line = lines[number].lstrip("\t") if found[1] else lines[number]
        if line == found[3]:
            text = "".join(f"{each}\n" for each in body)
            return number + 1, Heredoc(found[3], text, not found[2])
        body.append(line)
    raise BuildError(f"{place}: here-document without an end (wanted a line {found[3]!r})")


def _instruction(whole: str, heredocs: tuple[Heredoc, ...], place: str, escape: str) -> Instruction:
    keyword, *rest = whole.split(None, 1)
    name, text = keyword.upper(), rest[0] if rest else ""
    if name not in INSTRUCTIONS:
        known = ", ".join(sorted(INSTRUCTIONS))
        raise BuildError(f"{place}: instruction {keyword[:40]!r} is not supported (wanted one of {known})")
    flags = []
    if name in _FLAGS:
        while text.startswith("--"):
            flag = _FLAG.match(text)
            if flag is None:
                raise BuildError(f"{place}: {name}: malformed flag (got {text.split()[0]!r}, wanted --name=value)")
            flags.append((flag[1], flag[2] or ""))
            text = text[flag.end() :]
    if not text:
        raise BuildError(f"{place}: {name}: wants an argument")
    words = exec_form(text) if name in _WITH_EXEC_FORM else None
    found = Instruction(name, text, words, tuple(flags), heredocs, place, whole)
    found.check_flags(*_FLAGS.get(name, ()))
    if name in ("ENV", "LABEL"):
        try:
            pairs(text, escape)
        except ExpansionError as error:
            raise found.error(str(error)) from None
    return found


def exec_form(text: str) -> tuple[str, ...] | None:
    """Return the words of a JSON array of strings. None for other text, which is in the shell form, as in Docker."""
    if not text.startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        return None
    return tuple(found)
