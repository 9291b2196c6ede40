"""A trace that is derived, not recorded: the likely reads of a start, by the image's own configuration.

Programs of the entrypoint and command are found as execve finds them, with scripts' interpreters and the commands in
scripts, the loader, the libraries along the loader's search path, the imports of sources, and files that programs and
configurations name. A profile learned from other images' traces adds files that no text names, and says which part of
a file is read. The metadata on the way becomes part of the trace.
"""

from __future__ import annotations

import os
import re
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from obdlab.formats.trace import Trace
from obdlab.traces.imagefiles import MAX_FILES, ImageFiles
from obdlab.traces.languages import MAX_SOURCE, Language
from obdlab.traces.loader import Loader
from obdlab.traces.replay import reads_of_disk
from obdlab.traces.runtimes import language_of
from obdlab.traces.scripts import MAX_TEXT, commands_in, is_shell, is_wrapper, names_in, unwrapped
from obdlab.traces.sets import unique
from obdlab.traces.shellvariables import Variables
from obdlab.volumes.elf import MAGIC

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from obdlab.layers.stack import Stack
    from obdlab.traces.profile import Chosen, Profile

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Bounds on the work for one image.
_MAX_NAMES = 1024
_MAX_WORDS = 64
# Each takes some ten calls within each other.
_MAX_DEPTH = 48
_MAX_LINE = 4096
_MAX_DIRECTORIES = 64
_MAX_INCLUDES = 64
_MAX_PROGRAM = 64 << 20
#: Larger files are read in part by a start: their head, and of programs the parts that the loader writes to.
WHOLE_SIZE = 4 << 20
PROGRAM_SIZE = 64 << 20
_HEAD = 128 << 10
# The kernel looks this far for a script's interpreter.
_TEXT_HEAD = 256
# Files that a text or program merely names are likely read only if they are no larger.
_NAMED_SIZE = 256 << 10

_LIBC_FILES = ("/etc/nsswitch.conf", "/etc/passwd", "/etc/group", "/etc/localtime")
_LOCALE_FILES = ("/usr/lib/locale/locale-archive", "/usr/lib/locale/C.utf8/LC_CTYPE")
# Paths in a program's data.
_NAMED = re.compile(rb"/(?:etc|usr/share|usr/lib|usr/local|var/lib|opt|srv)/[\w./+-]{2,200}")


@dataclass(frozen=True, slots=True)
class Suggested:
    """A trace of the start that is likely, the files it is of in order, and paths or reasons that were left out.

    ``followed`` are the files that rules found, without those that only a profile named.
    """

    trace: Trace
    files: tuple[bytes, ...]
    left_out: tuple[str, ...]
    followed: tuple[bytes, ...]


def suggest(disk: Stack, document: Mapping[str, Any], profile: Profile | None = None) -> Suggested:
    """Return the likely reads of a start of the image on ``disk`` with the image config ``document``.

    Raises FormatError for an unknown or damaged file system, and the errors of reading the disk. Programs that are
    missing or malformed are left out.
    """
    start = _Start(disk)
    start.follow(document)
    found = list(start.files)
    chosen: Mapping[bytes, Chosen] = {}
    if profile is not None and found:
        chosen = profile.choose(found, start.image)
        start.load_needed(path for path, each in chosen.items() if each.ranges)
        # The libraries that chosen files need are followed now: judge them as such.
        chosen = profile.choose(start.files, start.image, found)
    start.note(chosen)
    reads = (read for begin, end in start.image.ranges for read in reads_of_disk(disk, begin, end - begin))
    return Suggested(unique(Trace.from_reads(reads)), tuple(start.noted), tuple(start.left_out), tuple(found))


class _Start:
    # Follows one start. `files` has the real paths of the files met in order, with the ranges of their likely reads.
    def __init__(self, disk: Stack) -> None:
        self.image = ImageFiles(disk)
        self.files: dict[bytes, list[tuple[int, int]]] = {}
        self.noted: list[bytes] = []
        self.left_out: list[str] = []
        self._loader = Loader(self.image)
        self._variables = Variables({})
        self._depth = 0
        # Interpreters whose own files were added.
        self._begun: set[bytes] = set()
        # Sources and texts that were looked through, each by its language or none.
        self._seen: set[tuple[bytes, type[Language] | None]] = set()

    def follow(self, document: Mapping[str, Any]) -> None:
        config = document.get("config")
        config = config if isinstance(config, dict) else {}
        self._variables = Variables(dict(each.partition("=")[::2] for each in _texts(config.get("Env"))))
        self._variables.assign_default("PATH", _PATH)
        directory = config.get("WorkingDir")
        self._place = next((each for each in _texts([directory]) if each.startswith("/")), "/")
        for words in _commands(config):
            self._run(words)
        if self.files:
            for name in (*_LIBC_FILES, *_LOCALE_FILES):
                self._add(name.encode())

    # Adds the libraries that files which a profile chose need.
    def load_needed(self, paths: Iterable[bytes]) -> None:
        for path in list(paths):
            if path in self.files or self.image.is_directory(path):
                continue
            if self.image.read(path, 0, len(MAGIC)) == MAGIC:
                self._load(path)

    # Notes what was found; of files that a profile knows, the parts that it has seen read.
    def note(self, chosen: Mapping[bytes, Chosen]) -> None:
        for path, ranges in self.files.items():
            other = chosen.get(path)
            if other is None:
                self._note(path, ranges)
            elif other.ranges:
                self._note(path, other.ranges)
        more = sorted(
            (other.order, path) for path, other in chosen.items() if path not in self.files and other.ranges
        )
        for _, path in more[: MAX_FILES - len(self.noted)]:
            if self.image.is_directory(path):
                self.image.open_directory(path)
            else:
                self._note(path, chosen[path].ranges)

    def _note(self, path: bytes, ranges: Iterable[tuple[int, int]]) -> None:
        self.noted.append(path)
        self.image.open(path)
        for begin, end in ranges:
            self.image.note(path, begin, end)

    # Returns the real path of a program, as execvp looks for it.
    def _program(self, name: str, path: Sequence[str]) -> bytes | None:
        if "/" in name:
            return self.image.real(os.fsencode(os.path.join(self._place, name)))
        found = (self.image.search(os.fsencode(os.path.join(self._place, each, name))) for each in path)
        return next((each for each in found if each is not None), None)

    # Follows a command line of the image's configuration, whose program must be there.
    def _run(self, words: Sequence[str]) -> None:
        if self._command(words) is None:
            self.left_out.append(f"{words[0]}: missing")

    def _command(self, words: Sequence[str]) -> bytes | None:
        first = None
        commands = unwrapped(list(words[:_MAX_WORDS]))
        for number, each in enumerate(commands):
            program = self._program(each[0], _directories_of(self._variables, "PATH"))
            if number == 0:
                first = program
            if program is not None:
                self._load(program)
            # The arguments of a wrapper are another command.
            if number == len(commands) - 1:
                self._arguments(program, each)
        return first

    def _language(self, program: bytes) -> Language | None:
        return language_of(self.image, program, self._variables.environment())

    def _arguments(self, program: bytes | None, words: Sequence[str]) -> None:
        language = self._language(program) if program is not None else None
        for each in language.given(words[1:]) if language is not None else ():
            self._source(each, language)
        shell = is_shell(os.path.basename(words[0]))
        for option, text in pairwise(["", *words[1:]]):
            if option == "-c" and language is None:
                self._shell(text[:_MAX_LINE])
            for part in (text, text.partition("=")[2]):
                for name in part.split(":")[:_MAX_DIRECTORIES] if len(part) <= _MAX_LINE else ():
                    if "/" not in name and "." not in name:
                        continue
                    found = self.image.real(os.fsencode(os.path.join(self._place, name)))
                    if found is not None and shell:
                        self._shell_file(found, starts=True)
                        shell = False
                    elif found is not None:
                        self._source(found, language)

    def _shell(self, text: str) -> None:
        for words in commands_in(text, self._variables):
            if words[0] == "source":
                found = self.image.real(os.fsencode(os.path.join(self._place, words[1])))
                if found is not None:
                    self._shell_file(found)
            elif not is_wrapper(words[0]) or len(words) > 1:
                self._command(words)

    # Follows a script, one that is started or one that another reads commands of.
    def _shell_file(self, path: bytes, *, starts: bool = False) -> None:
        self._add(path)
        if (path, None) in self._seen or not self._deeper(path):
            return
        self._seen.add((path, None))
        outer = self._variables.values("0")[0]
        if starts:
            self._variables.name_script(os.fsdecode(path))
        self._shell(self.image.read(path, 0, MAX_TEXT).decode(errors="surrogateescape"))
        self._variables.name_script(outer)
        self._depth -= 1

    # Returns False if programs and scripts start each other more deeply than a start is worth.
    def _deeper(self, path: bytes) -> bool:
        if self._depth >= _MAX_DEPTH:
            self.left_out.append(f"{os.fsdecode(path)}: started by {_MAX_DEPTH} others one after another")
            return False
        self._depth += 1
        return True

    # Adds a program with all that it loads: breadth first, as the loader does.
    def _load(self, program: bytes) -> None:
        if self._deeper(program):
            self._load_all(program)
            self._depth -= 1

    def _load_all(self, program: bytes) -> None:
        pending: deque[tuple[bytes, bytes]] = deque([(program, b"")])  # with the rpaths of those that load it
        while pending:
            path, inherited = pending.popleft()
            if not self._add(path):
                continue
            head = self.image.read(path, 0, _TEXT_HEAD)
            if head.startswith(b"#!"):
                self._script(path, head)
            elif head.startswith(MAGIC):
                pending += self._linked(path, inherited)
                self._run_time(path)
        head = self.image.read(program, 0, len(MAGIC))
        if head == MAGIC and (program, None) not in self._seen:
            self._seen.add((program, None))
            self._named(program)
            self._run_time(program)

    def _script(self, path: bytes, head: bytes) -> None:
        words = [os.fsdecode(word) for word in head[2:].split(b"\n")[0].split()[:4]]
        for number, word in enumerate(words):
            if number and os.path.basename(words[0]) != "env":
                break
            if word.startswith("-"):
                continue
            found = self._program(word, _PATH.split(":"))
            if found is not None:
                self._load(found)
                if is_shell(os.path.basename(word)):
                    self._shell_file(path, starts=True)
                else:
                    self._source(path, self._language(found))

    # Files that a program names in its data: configurations, most of all.
    def _named(self, program: bytes) -> None:
        data = self.image.read(program, 0, _MAX_PROGRAM)
        for name in _names_in_data(data):
            found = self.image.real(name)
            if found is not None and self.image.size(found) <= _NAMED_SIZE:
                self._configuration(found)

    def _run_time(self, path: bytes) -> None:
        language = self._language(path)
        if language is not None and path not in self._begun:
            self._begun.add(path)
            for each in language.start():
                self._source(each, language)
            for each in language.programs():
                self._load(each)

    # Adds a source or text with the files that it loads or names.
    def _source(self, path: bytes, language: Language | None) -> None:
        pending = deque([path])
        while pending:
            source = pending.popleft()
            key = (source, type(language) if language else None)
            if key in self._seen:
                continue
            self._seen.add(key)
            if len(self.files) >= MAX_FILES:
                break
            self._add(language.stored(source) if language is not None else source)
            head = self.image.read(source, 0, _TEXT_HEAD)
            if head.startswith(MAGIC):
                self._load_again(source)
            elif language is not None:
                pending += language.needed(source, self.image.read(source, 0, MAX_SOURCE))
            else:
                self._seen.discard(key)
                self._configuration(source)

    # A library that an interpreter opens: added before, so that its own ones remain.
    def _load_again(self, path: bytes) -> None:
        for each, _ in list(self._linked(path, b"")):
            self._load(each)

    # Adds a text with the files that it names, and the texts among these in their turn.
    def _configuration(self, path: bytes) -> None:
        pending = deque([path])
        while pending:
            text = pending.popleft()
            if (text, None) in self._seen:
                continue
            self._seen.add((text, None))
            self._add(text)
            data = self.image.read(text, 0, MAX_TEXT)
            if data.startswith(MAGIC):
                self._load_again(text)
                self._run_time(text)
            elif b"\0" not in data and self.image.size(text) <= MAX_TEXT:
                for name in names_in(data):
                    pending += self._files_named(name, os.path.dirname(text))

    def _files_named(self, name: bytes, here: bytes) -> Iterator[bytes]:
        full = os.path.join(here, name)
        if b"*" in name:
            directory, pattern = os.path.split(full)
            if b"*" not in directory:
                begin, _, end = pattern.partition(b"*")
                listed = [
                    each for each in self.image.names(directory) if each.startswith(begin) and each.endswith(end)
                ]
                names = [directory + b"/" + each for each in listed[:_MAX_INCLUDES]]
            else:
                names = []
        else:
            names = [full]
        for each in names:
            found = self.image.real(each)
            if found is not None and (self.image.size(found) <= _NAMED_SIZE or found.endswith(b".so")):
                yield found

    def _linked(self, path: bytes, inherited: bytes) -> list[tuple[bytes, bytes]]:
        loaded = self._loader.loaded(path, inherited, _directories_of(self._variables, "LD_LIBRARY_PATH"))
        self.left_out += loaded.left_out
        if path in self.files and self.image.size(path) > self._whole_size(path):
            self.files[path] += [(begin, min(end, begin + WHOLE_SIZE)) for begin, end in loaded.written]
        if loaded.is_program:
            self._add(b"/etc/ld.so.cache")
        return list(loaded.files)

    # Adds a file; returns False if it is missing, there before, or one too many.
    def _add(self, name: bytes) -> bool:
        path = self.image.real(name)
        if path is None or path in self.files:
            return False
        if len(self.files) >= MAX_FILES:
            if len(self.left_out) <= MAX_FILES:
                self.left_out.append(f"{os.fsdecode(path)}: more than {MAX_FILES} files")
            return False
        size = self.image.size(path)
        self.files[path] = [(0, size if size <= self._whole_size(path) else _HEAD)]
        return True

    # Of programs and of the libraries that they are made of, most is read.
    def _whole_size(self, path: bytes) -> int:
        return PROGRAM_SIZE if self.image.read(path, 0, len(MAGIC)) == MAGIC else WHOLE_SIZE


# Returns paths in a program's data, each once. It stops at the bound: the data may be all names.
def _names_in_data(data: bytes) -> list[bytes]:
    found: dict[bytes, None] = {}
    for match in _NAMED.finditer(data):
        found[match[0]] = None
        if len(found) >= _MAX_NAMES:
            break
    return list(found)


# Texts that no path can hold are left out.
def _texts(value: object) -> list[str]:
    return [each for each in value if isinstance(each, str) and _can_name(each)] if isinstance(value, list) else []


def _can_name(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


# An entrypoint is often a script that ends in exec "$@": the command is a command line of its own, too.
def _commands(config: Mapping[str, Any]) -> Iterator[list[str]]:
    entrypoint, command = _texts(config.get("Entrypoint")), _texts(config.get("Cmd"))
    if entrypoint and entrypoint[0] and not entrypoint[0].startswith("-"):
        yield [*entrypoint, *command]
    if command and command[0] and not command[0].startswith("-") and command[0] != (entrypoint or [""])[0]:
        yield command


def _directories_of(variables: Variables, name: str) -> list[str]:
    found = dict.fromkeys(each for value in variables.values(name) for each in value.split(":") if each)
    return list(found)[:_MAX_DIRECTORIES]
