"""The files that an interpreter loads for a program: its own start set, and the imports of sources, by their text.

Each class knows one language. Imports are found by patterns, not by a parser: sources are hostile, and those
that a function makes later are no part of a start. A pattern must not try two ways to divide a long run of the same
characters: its time grew with the square of a line's length. Possessive quantifiers ("*+", "++") give nothing back.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from obdlab.traces.imagefiles import ImageFiles

#: Longer sources are looked through up to here.
MAX_SOURCE = 1 << 20
_MAX_DIRECTORIES = 64
_TRIPLES = (b"x86_64-linux-gnu", b"aarch64-linux-gnu")


class Language(ABC):
    """One interpreter, the real path ``program``, with the variables of its environment."""

    def __init__(self, files: ImageFiles, program: bytes, environment: Mapping[str, str]) -> None:
        self._files = files
        self.program = program
        self._environment = environment
        self._kept: dict[bytes, list[bytes]] = {}

    @classmethod
    @abstractmethod
    def fits(cls, program: bytes) -> bool:
        """Return True if the program is an interpreter of this language."""

    def start(self) -> Iterator[bytes]:
        """Yield files that are loaded before a program's first line."""
        return iter(())

    def given(self, words: Sequence[str]) -> Iterator[bytes]:
        """Yield files that a program loads because of its arguments, beside those that these name."""
        return iter(())

    def programs(self) -> Iterator[bytes]:
        """Yield programs that this one runs before any of those it is given."""
        return iter(())

    @abstractmethod
    def needed(self, path: bytes, source: bytes) -> Iterator[bytes]:
        """Yield the sources and libraries that ``source`` loads."""

    def stored(self, path: bytes) -> bytes:
        """Return the file that is read in place of a source: a compiled one, or itself."""
        return path

    # Returns names in a directory that match a pattern.
    def _listed(self, directory: bytes, pattern: re.Pattern[bytes]) -> list[bytes]:
        if directory not in self._kept:
            self._kept[directory] = self._files.names(directory)
        return [name for name in self._kept[directory] if pattern.fullmatch(name)][:_MAX_DIRECTORIES]

    # Returns the first file that is there, as an interpreter looks for it.
    def _first(self, candidates: Iterator[bytes]) -> bytes | None:
        return next((found for each in candidates if (found := self._files.search(each)) is not None), None)

    def _variable(self, name: str) -> list[bytes]:
        return [os.fsencode(each) for each in self._environment.get(name, "").split(":")[:_MAX_DIRECTORIES] if each]


class Python(Language):
    """CPython 3."""

    _PROGRAM = re.compile(rb"(.*)/bin/python(3)\.(\d{1,2})")
    _IMPORT = re.compile(rb"[ \t]*+(?:from[ \t]++(\.*+)([\w.]*+)[ \t]++import[ \t]++(.*)|import[ \t]++(.*))")
    # Since 3.11 the other modules that it starts with are part of the program.
    _BEFORE_FROZEN = (
        b"codecs",
        b"io",
        b"abc",
        b"site",
        b"os",
        b"stat",
        b"_collections_abc",
        b"posixpath",
        b"genericpath",
    )

    def __init__(self, files: ImageFiles, program: bytes, environment: Mapping[str, str]) -> None:
        super().__init__(files, program, environment)
        match = self._PROGRAM.fullmatch(program)
        assert match is not None
        prefix, _, minor = match.groups()
        self._minor = int(minor)
        version = b"python3." + minor
        library = prefix + b"/lib/" + version
        self._path = [
            *self._variable("PYTHONPATH"),
            *(library, library + b"/lib-dynload"),
            *(prefix + b"/local/lib/" + version + b"/dist-packages", prefix + b"/lib/python3/dist-packages"),
            library + b"/site-packages",
        ]
        self._suffixes = [b".cpython-3%b-%b.so" % (minor, triple) for triple in _TRIPLES] + [b".abi3.so", b".so"]

    @classmethod
    def fits(cls, program: bytes) -> bool:
        """Return True for "python3.N"."""
        return cls._PROGRAM.fullmatch(program) is not None

    def start(self) -> Iterator[bytes]:
        """Yield the encodings, and before 3.11 the modules that are no part of the program."""
        names = [b"encodings", b"encodings.aliases", b"encodings.utf_8", b"sitecustomize"]
        for name in names + (list(self._BEFORE_FROZEN) if self._minor < 11 else []):
            yield from self._module(name, self._path)

    def stored(self, path: bytes) -> bytes:
        """Return the compiled file if the image has it."""
        directory, name = os.path.split(path)
        if not name.endswith(b".py"):
            return path
        compiled = b"%b/__pycache__/%b.cpython-3%d.pyc" % (directory, name[:-3], self._minor)
        return self._files.real(compiled) or path

    def needed(self, path: bytes, source: bytes) -> Iterator[bytes]:
        """Yield modules that the source imports outside of functions and classes."""
        here = os.path.dirname(path)
        places = [here, *self._path]
        for dots, module, names in self._imports(source):
            if dots:
                base = here
                for _ in range(len(dots) - 1):
                    base = os.path.dirname(base)
                roots = [base]
                if not module:
                    yield from self._package(base)
            else:
                roots = places
            if module:
                yield from self._module(module, roots)
            for name in names:
                yield from self._last(module + b"." + name if module else name, roots)

    def _imports(self, source: bytes) -> Iterator[tuple[bytes, bytes, list[bytes]]]:
        inside = False
        lines = iter(source[:MAX_SOURCE].splitlines())
        for line in lines:
            if line and line[0] not in b" \t#)]}\"'":
                inside = line.startswith((b"def ", b"class ", b"async ", b"if TYPE_CHECKING", b"if typing.TYPE"))
            if inside or b"import" not in line:
                continue
            match = self._IMPORT.match(line)
            if match is None:
                continue
            dots, module, names, modules = match.groups()
            if modules is not None:
                for each in modules.split(b"#")[0].split(b";")[0].split(b","):
                    word = each.split()
                    if word:
                        yield b"", word[0], []
                continue
            text = names.split(b"#")[0]
            if text.lstrip().startswith(b"("):
                for _ in range(256):
                    if b")" in text:
                        break
                    following = next(lines, None)
                    if following is None:
                        break
                    text += b" " + following.split(b"#")[0]
            listed = [each.split()[0] for each in text.strip(b"() \t").split(b",") if each.split()]
            yield dots, module, [each for each in listed[:256] if each.replace(b"_", b"a").isalnum()]

    def _package(self, directory: bytes) -> Iterator[bytes]:
        found = self._files.real(directory + b"/__init__.py")
        if found is not None:
            yield found

    # A module loads the packages that it is in first.
    def _module(self, name: bytes, places: list[bytes]) -> Iterator[bytes]:
        parts = name.split(b".")[:16]
        for count in range(1, len(parts) + 1):
            yield from self._last(b".".join(parts[:count]), places)

    def _last(self, name: bytes, places: list[bytes]) -> Iterator[bytes]:
        inner = name.replace(b".", b"/")
        for place in places:
            base = place + b"/" + inner
            found = self._first(
                iter((base + b"/__init__.py", *(base + each for each in self._suffixes), base + b".py"))
            )
            if found is not None:
                yield found
                return


class Perl(Language):
    """Perl 5."""

    _PROGRAM = re.compile(rb".*/bin/perl(?:5[\d.]*)?")
    _USE = re.compile(rb"^(?:[ \t]*(?:use|no)|require)[ \t]+([A-Za-z_]\w*(?:::\w+)*)([^;\n]{0,400})", re.MULTILINE)
    _NAMED = re.compile(rb"[A-Z]\w*(?:::\w+)+")
    _VERSION = re.compile(rb"5\.\d+(?:\.\d+)?")

    def __init__(self, files: ImageFiles, program: bytes, environment: Mapping[str, str]) -> None:
        super().__init__(files, program, environment)
        self._places = self._variable("PERL5LIB")
        for triple in _TRIPLES:
            for version in self._listed(b"/usr/lib/" + triple + b"/perl", self._VERSION):
                self._places += [
                    *(b"/usr/lib/" + triple + b"/perl5/" + version, b"/usr/share/perl5"),
                    *(b"/usr/lib/" + triple + b"/perl-base", b"/usr/lib/" + triple + b"/perl/" + version),
                    b"/usr/share/perl/" + version,
                ]
            if not self._places:
                self._places = [b"/usr/share/perl5", b"/usr/lib/" + triple + b"/perl-base"]
        for version in self._listed(b"/usr/local/lib/perl5", re.compile(rb"5\.\d+\.\d+")):
            self._places += [b"/usr/local/lib/perl5/site_perl/" + version, b"/usr/local/lib/perl5/" + version]

    @classmethod
    def fits(cls, program: bytes) -> bool:
        """Return True for "perl"."""
        return cls._PROGRAM.fullmatch(program) is not None

    def needed(self, path: bytes, source: bytes) -> Iterator[bytes]:
        """Yield modules that "use" names anywhere, those of "require" at a line's begin, and shared objects."""
        text = source[:MAX_SOURCE].split(b"\n__END__")[0].split(b"\n__DATA__")[0]
        for match in self._USE.finditer(text):
            names = [match[1], *self._NAMED.findall(match[2])]
            for name in names[:32]:
                inner = name.replace(b"::", b"/")
                found = self._first(place + b"/" + inner + b".pm" for place in self._places)
                if found is not None:
                    yield found
        if b"XSLoader" in text or b"DynaLoader" in text or b"bootstrap" in text:
            yield from self._shared(path)

    def _shared(self, path: bytes) -> Iterator[bytes]:
        for place in self._places:
            if path.startswith(place + b"/"):
                inner = path[len(place) + 1 :].removesuffix(b".pm")
                name = os.path.basename(inner)
                found = self._first(each + b"/auto/" + inner + b"/" + name + b".so" for each in self._places)
                if found is not None:
                    yield found


class Ruby(Language):
    """CRuby."""

    _PROGRAM = re.compile(rb".*/bin/ruby(?:\d[\d.]*)?")
    _REQUIRE = re.compile(rb"[ \t]*require(_relative)?[ \t(]*[\"']([^\"'#]{1,200})[\"']")
    _VERSION = re.compile(rb"\d+\.\d+\.\d+")

    def __init__(self, files: ImageFiles, program: bytes, environment: Mapping[str, str]) -> None:
        super().__init__(files, program, environment)
        self._places = self._variable("RUBYLIB")
        for root in (b"/usr", b"/usr/local"):
            self._places.append(root + b"/lib/ruby/vendor_ruby")
            for version in self._listed(root + b"/lib/ruby", self._VERSION):
                library = root + b"/lib/ruby/" + version
                self._places += [library, *(library + b"/" + each for each in (b"x86_64-linux", b"aarch64-linux"))]
                for triple in _TRIPLES:
                    arch = root + b"/lib/" + triple + b"/ruby/"
                    self._places += [arch + b"vendor_ruby/" + version, arch + version]
        roots = [b"/usr/share/rubygems-integration", b"/var/lib/gems", b"/usr/local/bundle"]
        roots += [b"/usr/local/lib/ruby/gems", b"/usr/lib/ruby/gems"]
        roots += [b"/usr/lib/" + triple + b"/rubygems-integration" for triple in _TRIPLES]
        for gems in roots:
            any_name = re.compile(rb"[\w.+-]+")
            for below in (gems, *(gems + b"/" + each for each in self._listed(gems, any_name))):
                self._places += [
                    below + b"/gems/" + each + b"/lib" for each in self._listed(below + b"/gems", any_name)
                ]

    @classmethod
    def fits(cls, program: bytes) -> bool:
        """Return True for "ruby"."""
        return cls._PROGRAM.fullmatch(program) is not None

    def start(self) -> Iterator[bytes]:
        """Yield RubyGems, the helpers that are loaded with it, and the encodings."""
        for name in (b"enc/encdb", b"enc/trans/transdb", b"rubygems", b"error_highlight", b"did_you_mean"):
            yield from self._found(name)
        yield from self._found(b"syntax_suggest/core_ext")

    def needed(self, path: bytes, source: bytes) -> Iterator[bytes]:
        """Yield the files that "require" names outside of methods."""
        here = os.path.dirname(path)
        until = b""
        for line in source[:MAX_SOURCE].splitlines():
            if until:
                if line.rstrip() == until:
                    until = b""
                continue
            stripped = line.lstrip()
            if stripped.startswith(b"def ") and not stripped.rstrip().endswith(b"end"):
                until = line[: len(line) - len(stripped)] + b"end"
                continue
            match = self._REQUIRE.match(line)
            if match is None:
                continue
            relative, name = match.groups()
            if relative or name.startswith((b"./", b"../")):
                base = os.path.normpath(here + b"/" + name)
                found = self._first(iter((base + b".rb", base)))
                if found is not None:
                    yield found
            else:
                yield from self._found(name)

    def _found(self, name: bytes) -> Iterator[bytes]:
        name = name.removesuffix(b".rb").removesuffix(b".so")
        found = self._first(place + b"/" + name + end for end in (b".rb", b".so") for place in self._places)
        if found is not None:
            yield found


class Node(Language):
    """Node.js."""

    _PROGRAM = re.compile(rb".*/bin/node(?:js)?")
    _REQUIRE = re.compile(rb"""(?:^|[\s=(,.])(?:require\(\s*|from\s+|import\s+)['"]([^'"\n]{1,200})['"]""")

    @classmethod
    def fits(cls, program: bytes) -> bool:
        """Return True for "node"."""
        return cls._PROGRAM.fullmatch(program) is not None

    def needed(self, path: bytes, source: bytes) -> Iterator[bytes]:
        """Yield the modules that "require" and "import" name at most one level deep, with their package.json."""
        if not path.endswith((b".js", b".cjs", b".mjs")):
            return
        here = os.path.dirname(path)
        for line in source[:MAX_SOURCE].splitlines():
            if line.startswith(b"     ") or len(line) > 4096:
                continue
            for match in self._REQUIRE.finditer(line):
                yield from self._resolved(match[1], here)

    def _resolved(self, name: bytes, here: bytes) -> Iterator[bytes]:
        if name.startswith((b"./", b"../", b"/")) or name in (b".", b".."):
            yield from self._at(os.path.normpath(os.path.join(here, name)))
            return
        places = [here]
        while len(places[-1]) > 1 and len(places) < _MAX_DIRECTORIES:
            places.append(os.path.dirname(places[-1]))
        modules = [place.rstrip(b"/") + b"/node_modules" for place in places if not place.endswith(b"/node_modules")]
        for place in (*modules, *self._variable("NODE_PATH"), b"/usr/share/nodejs", b"/usr/lib/nodejs"):
            found = list(self._at(place + b"/" + name))
            if found:
                yield from found
                return

    def _at(self, base: bytes) -> Iterator[bytes]:
        package = self._files.real(base + b"/package.json")
        if package is not None:
            yield package
            try:
                document = json.loads(self._files.read(package, 0, 64 << 10))
            except (ValueError, RecursionError):
                document = None
            main = document.get("main") if isinstance(document, dict) else None
            if isinstance(main, str) and main and "\0" not in main:
                found = list(self._file(os.path.normpath(base + b"/" + os.fsencode(main))))
                if found:
                    yield from found
                    return
        yield from self._file(base)

    def _file(self, base: bytes) -> Iterator[bytes]:
        ends = (b"", b".js", b".json", b".node", b".cjs", b"/index.js", b"/index.json")
        found = self._first(base + end for end in ends)
        if found is not None:
            yield found


class Php(Language):
    """PHP: the command, the process manager, and Apache's module."""

    _PROGRAM = re.compile(rb".*/(?:php|php-fpm|libphp)(\d+\.\d+|\d)?(?:\.so)?")
    _EXTENSION = re.compile(rb"^[ \t]*(?:zend_)?extension[ \t]*=[ \t]*\"?([\w./-]+)", re.MULTILINE)
    _INCLUDE = re.compile(
        rb"""^[ \t]*+(?:require|include)(?:_once)?[ \t(]*+(?:(?:__DIR__|dirname\([ \t]*+__FILE__[ \t]*+\))"""
        rb"""[ \t]*+\.[ \t]*+)?['"]([^'"\n]{1,200}\.(?:php|inc))['"]""",
        re.MULTILINE,
    )
    _KINDS = ((b"fpm", b"fpm"), (b"libphp", b"apache2"), (b"php", b"cli"))

    @classmethod
    def fits(cls, program: bytes) -> bool:
        """Return True for "php", "php-fpm" and "libphp.so", with or without a version."""
        return cls._PROGRAM.fullmatch(program) is not None

    def start(self) -> Iterator[bytes]:
        """Yield php.ini, the files of conf.d and the extensions that these name."""
        name = os.path.basename(self.program)
        kind = next(kind for part, kind in self._KINDS if part in name)
        places = [(b"/usr/local/etc/php", b"/usr/local/lib/php/extensions")]
        places += [
            (b"/etc/php/" + version + b"/" + kind, b"/usr/lib/php")
            for version in self._listed(b"/etc/php", re.compile(rb"\d+\.\d+"))
            if version in name or not re.search(rb"\d", name)
        ]
        for place, extensions in places:
            inis = [place + b"/php.ini"]
            inis += [place + b"/conf.d/" + each for each in self._listed(place + b"/conf.d", re.compile(rb".*\.ini"))]
            for each in inis:
                ini = self._files.real(each)
                if ini is not None:
                    yield ini
                    yield from self._extensions(self._files.read(ini, 0, 128 << 10), extensions)

    def _extensions(self, text: bytes, directory: bytes) -> Iterator[bytes]:
        for match in self._EXTENSION.finditer(text):
            name = match[1].removesuffix(b".so") + b".so"
            places = [directory + b"/" + each for each in self._listed(directory, re.compile(rb".*\d{8}.*"))]
            found = self._first(place + b"/" + name for place in (*places, b""))
            if found is not None:
                yield found

    def needed(self, path: bytes, source: bytes) -> Iterator[bytes]:
        """Yield the files that are included by a literal name."""
        here = os.path.dirname(path)
        for match in self._INCLUDE.finditer(source[:MAX_SOURCE]):
            name = match[1]
            found = self._files.real(name if name.startswith(here + b"/") else here + b"/" + name.lstrip(b"/"))
            found = found or (self._files.real(name) if name.startswith(b"/") else None)
            if found is not None:
                yield found
