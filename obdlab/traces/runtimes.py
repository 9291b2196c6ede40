"""Run-time systems whose programs are archives or compiled modules: the JVM, Erlang's and R."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from obdlab.traces.languages import Language, Node, Perl, Php, Python, Ruby

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from obdlab.traces.imagefiles import ImageFiles

_MAX_BOOT = 256 << 10
_MAX_APPLICATION = 64 << 10
# Applications of one start, and modules of one of them.
_MAX_APPLICATIONS = 64
_MAX_MODULES = 1024
_MAX_HOMES = 16


class Java(Language):
    """The JVM: its own files. Archives of classes name the classes that a program loads."""

    _PROGRAM = re.compile(rb"(.*)/bin/java")
    _ARCHIVE = re.compile(rb".*\.jar")
    _START = (
        *(b"jvm.cfg", b"libjli.so", b"server/libjvm.so", b"server/classes.jsa", b"libjimage.so", b"libjava.so"),
        *(b"modules", b"tzdb.dat", b"security/java.security", b"libzip.so", b"libnio.so", b"libnet.so"),
    )

    @classmethod
    def fits(cls, program: bytes) -> bool:
        """Return True for "java"."""
        return cls._PROGRAM.fullmatch(program) is not None

    def start(self) -> Iterator[bytes]:
        """Yield the libraries, the archive of classes and the modules file."""
        home = os.path.dirname(os.path.dirname(self.program))
        for name in self._START:
            for directory in (b"/lib/", b"/conf/"):
                found = self._files.real(home + directory + name)
                if found is not None:
                    yield found
                    break

    def given(self, words: Sequence[str]) -> Iterator[bytes]:
        """Yield the archives in the directory "lib" of an application's home, which a property names."""
        homes = dict.fromkeys(
            os.fsencode(value) for word in words if word.startswith("-D") and (value := word.partition("=")[2])
        )
        for home in list(homes)[:_MAX_HOMES]:
            if home.startswith(b"/"):
                for name in self._listed(home + b"/lib", self._ARCHIVE):
                    found = self._files.real(home + b"/lib/" + name)
                    if found is not None:
                        yield found

    def needed(self, path: bytes, source: bytes) -> Iterator[bytes]:
        """Yield nothing: archives are read by their directories."""
        return iter(())


class Erlang(Language):
    """Erlang's virtual machine: the modules of its boot file, and applications that variables name."""

    _PROGRAM = re.compile(rb"(.*)/erts-[\d.]+/bin/(erlexec|beam\.smp)")
    _PLACE = re.compile(rb"\$ROOT(/lib/[\w.-]+/ebin)")
    # An atom of Erlang's external format: a tag, its length, its text.
    _ATOM = re.compile(rb"w([\x01-\xff])(?=[a-z])")
    _NAMED = re.compile(rb"\{\s*applications\s*,\s*\[([\w\s,']*)\]")
    _MODULES = re.compile(rb"\{\s*modules\s*,\s*\[([\w\s,']*)\]")
    _VERSION = re.compile(rb"([a-z]\w*)-[\w.]+")

    @classmethod
    def fits(cls, program: bytes) -> bool:
        """Return True for the virtual machine and the program that starts it."""
        return cls._PROGRAM.fullmatch(program) is not None

    def programs(self) -> Iterator[bytes]:
        """Yield the virtual machine, and the program that starts others for it."""
        for name in (b"beam.smp", b"erl_child_setup", b"inet_gethost"):
            found = self._files.real(os.path.dirname(self.program) + b"/" + name)
            if found is not None and found != self.program:
                yield found

    def start(self) -> Iterator[bytes]:
        """Yield the boot file and its modules, and applications of ERL_LIBS that a variable has the name of."""
        match = self._PROGRAM.fullmatch(self.program)
        if match is None or match[2] != b"erlexec":
            return
        root = match[1]
        for name in (b"start_sasl.boot", b"start.boot"):
            boot = self._files.real(root + b"/bin/" + name)
            if boot is not None:
                yield boot
                yield from self._booted(root, self._files.read(boot, 0, _MAX_BOOT))
                break
        yield from self._applications(root)

    def _booted(self, root: bytes, boot: bytes) -> Iterator[bytes]:
        places = list(dict.fromkeys(self._PLACE.findall(boot)))[:_MAX_APPLICATIONS]
        names = (boot[match.end() : match.end() + match[1][0]] for match in self._ATOM.finditer(boot))
        for name in list(dict.fromkeys(names))[:_MAX_MODULES]:
            found = self._first_real(root + place + b"/" + name + b".beam" for place in places)
            if found is not None:
                yield found

    def _applications(self, root: bytes) -> Iterator[bytes]:
        known: dict[bytes, bytes] = {}
        libraries = self._variable("ERL_LIBS")
        for library in (*libraries, root + b"/lib"):
            for name in self._files.names(library)[:_MAX_MODULES]:
                match = self._VERSION.fullmatch(name)
                if match is not None:
                    known.setdefault(match[1], library + b"/" + name)
        pending = [each for value in self._environment.values() if (each := os.fsencode(value)) in known]
        done: set[bytes] = set()
        while pending and len(done) < _MAX_APPLICATIONS:
            name = pending.pop(0)
            if name in done or name not in known:
                continue
            done.add(name)
            place = known[name] + b"/ebin/"
            described = self._files.real(place + name + b".app")
            if described is None:
                continue
            yield described
            text = self._files.read(described, 0, _MAX_APPLICATION)
            pending += _atoms(self._NAMED.search(text))[:_MAX_APPLICATIONS]
            # Modules of Erlang itself are loaded when they are called.
            if known[name].startswith(root + b"/"):
                continue
            for module in _atoms(self._MODULES.search(text))[:_MAX_MODULES]:
                found = self._files.real(place + module + b".beam")
                if found is not None:
                    yield found

    def _first_real(self, candidates: Iterator[bytes]) -> bytes | None:
        return next((found for each in candidates if (found := self._files.real(each)) is not None), None)

    def needed(self, path: bytes, source: bytes) -> Iterator[bytes]:
        """Yield nothing: modules are loaded when they are called."""
        return iter(())


def _atoms(match: re.Match[bytes] | None) -> list[bytes]:
    return [] if match is None else re.findall(rb"\w+", match[1])


class R(Language):
    """R: its base packages, and those that a program loads."""

    _PROGRAM = re.compile(rb".*/bin/(?:Rscript|exec/R)")
    _HOMES = (b"/usr/lib/R", b"/usr/local/lib/R", b"/opt/R/lib/R")
    _PACKAGES = (b"methods", b"datasets", b"utils", b"grDevices", b"graphics", b"stats")
    _LIBRARY = re.compile(rb"\b(?:library|require|requireNamespace|loadNamespace)\s*\(\s*[\"']?([A-Za-z][\w.]{0,80})")
    _FILES = (
        *(
            b"Meta/package.rds",
            b"Meta/features.rds",
            b"Meta/nsInfo.rds",
            b"R/%b",
            b"R/%b.rdx",
            b"R/%b.rdb",
        ),
        *(b"R/sysdata.rdx", b"R/sysdata.rdb", b"data/Rdata.rds", b"data/Rdata.rdx", b"data/Rdata.rdb", b"libs/%b.so"),
    )

    def __init__(self, files: ImageFiles, program: bytes, environment: Mapping[str, str]) -> None:
        super().__init__(files, program, environment)
        homes = [*self._variable("R_HOME"), *self._HOMES]
        self._home = next((each for each in homes if files.real(each + b"/bin/exec/R") is not None), b"/usr/lib/R")
        self._libraries = [
            *self._variable("R_LIBS"),
            *self._variable("R_LIBS_SITE"),
            *(b"/usr/local/lib/R/site-library", b"/usr/lib/R/site-library", self._home + b"/library"),
        ]

    @classmethod
    def fits(cls, program: bytes) -> bool:
        """Return True for "Rscript" and the program behind the script "R"."""
        return cls._PROGRAM.fullmatch(program) is not None

    def programs(self) -> Iterator[bytes]:
        """Yield the script that Rscript runs."""
        if self.program.endswith(b"/Rscript"):
            found = self._first(iter((self._home + b"/bin/R",)))
            if found is not None:
                yield found

    def start(self) -> Iterator[bytes]:
        """Yield the settings and the packages that each session has."""
        if self.program.endswith(b"/Rscript"):
            return
        for name in (b"etc/Renviron", b"etc/Renviron.site", b"etc/Rprofile.site", b"library/base/R/Rprofile"):
            found = self._files.real(self._home + b"/" + name)
            if found is not None:
                yield found
        for package in (b"base", *self._PACKAGES):
            yield from self._package(package)

    def needed(self, path: bytes, source: bytes) -> Iterator[bytes]:
        """Yield the packages that a source names, not those that these need."""
        if path.endswith((b".R", b".r")):
            for name in list(dict.fromkeys(self._LIBRARY.findall(source[:_MAX_BOOT])))[:_MAX_APPLICATIONS]:
                yield from self._package(name)

    def _package(self, name: bytes) -> Iterator[bytes]:
        for library in self._libraries:
            if self._files.real(library + b"/" + name + b"/DESCRIPTION") is not None:
                for each in self._FILES:
                    found = self._files.real(library + b"/" + name + b"/" + each.replace(b"%b", name))
                    if found is not None:
                        yield found
                return


LANGUAGES: tuple[type[Language], ...] = (Python, Perl, Ruby, Node, Php, Java, Erlang, R)


def language_of(files: ImageFiles, program: bytes, environment: Mapping[str, str]) -> Language | None:
    """Return the language that a program interprets, or None."""
    found = next((each for each in LANGUAGES if each.fits(program)), None)
    return None if found is None else found(files, program, environment)
