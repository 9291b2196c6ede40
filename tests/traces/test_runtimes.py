"""The files of run-time systems: the JVM's, R's and Erlang's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from obdlab.cli.main import main
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.formats import oci
from obdlab.layerfiles.disks import open_disk
from obdlab.settings.settings import Settings
from obdlab.traces.languages import MAX_SOURCE
from obdlab.traces.likely import suggest
from obdlab.traces.runtimes import LANGUAGES, language_of
from tests.convert.layouts import make_layout, member

PROGRAM = Path("/usr/bin/env").read_bytes()
BOOT = b"\x83k\x00\x20$ROOT/lib/kernel-9.1/ebinw\x04codew\x06absentw"
APPLICATION = b"{application,broker,[{modules,[broker_app]},\n {applications,[kernel,helper]}]}."
FILES = {
    "usr/lib/jvm/java/bin/java": PROGRAM,
    "usr/lib/jvm/java/lib/modules": b"m" * 5000,
    "opt/tomcat/lib/catalina.jar": b"j" * 5000,
    "opt/tomcat/lib/notes.txt": b"n" * 5000,
    "usr/bin/Rscript": PROGRAM,
    "usr/lib/R/bin/R": b"#!/usr/bin/Rscript\n",
    "usr/lib/R/bin/exec/R": PROGRAM,
    "usr/lib/R/library/stats/DESCRIPTION": b"d",
    "usr/lib/R/library/stats/R/stats.rdb": b"r" * 5000,
    "usr/lib/R/library/extra/DESCRIPTION": b"d",
    "usr/lib/R/library/extra/libs/extra.so": b"e" * 5000,
    "usr/lib/R/library/unused/DESCRIPTION": b"d",
    "usr/lib/R/library/unused/R/unused.rdb": b"u" * 5000,
    "srv/worker.R": b"library('extra')\n",
    "usr/lib/erlang/erts-15.2/bin/erlexec": PROGRAM,
    "usr/lib/erlang/erts-15.2/bin/beam.smp": PROGRAM,
    "usr/lib/erlang/bin/start.boot": BOOT,
    "usr/lib/erlang/lib/kernel-9.1/ebin/code.beam": b"c" * 5000,
    "usr/lib/erlang/lib/kernel-9.1/ebin/other.beam": b"o" * 5000,
    "opt/broker/plugins/broker-4.0/ebin/broker.app": APPLICATION,
    "opt/broker/plugins/broker-4.0/ebin/broker_app.beam": b"b" * 5000,
    "opt/broker/plugins/helper-1.0/ebin/helper.app": b"{application,helper,[{modules,['helper_sup']}]}.",
    "opt/broker/plugins/helper-1.0/ebin/helper_sup.beam": b"h" * 5000,
    "opt/broker/plugins/other-1.0/ebin/other.app": b"{application,other,[]}.",
}


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runtimes")
    source = make_layout(root / "source", [[member(name, data, mode=0o755) for name, data in FILES.items()]])
    options = ["-q", "--database", "none", "--work-dir", str(root), "--vsize-gib", "1"]
    assert main(["image", "convert", *options, f"oci:{source.root}", f"oci:{root / 'image'}:v1"]) == 0
    layout = ImageLayout(root / "image")
    (entry,) = layout.select("v1")
    manifest = oci.Manifest.parse(layout.read_blob(entry, 1 << 20))
    return [str(layout.blob_path(each.digest)) for each in manifest.layers]


def followed(layers: Sequence[str], *command: str, variables: Sequence[str] = ()) -> set[str]:
    with open_disk(list(layers), Settings) as disk:
        found = suggest(disk, {"config": {"Cmd": list(command), "Env": list(variables)}})
    return {path.decode().lstrip("/") for path in found.files}


def test_java_reads_its_modules_and_the_archives_of_a_home_that_a_property_names(layers: list[str]) -> None:
    found = followed(layers, "/usr/lib/jvm/java/bin/java", "-Dcatalina.home=/opt/tomcat", "org.Main")
    assert {"usr/lib/jvm/java/lib/modules", "opt/tomcat/lib/catalina.jar"} <= found
    assert "opt/tomcat/lib/notes.txt" not in found
    assert "opt/tomcat/lib/catalina.jar" not in followed(layers, "/usr/lib/jvm/java/bin/java", "org.Main")


def test_r_reads_its_own_packages_and_those_that_the_source_names(layers: list[str]) -> None:
    found = followed(layers, "/usr/bin/Rscript", "/srv/worker.R")
    assert {"usr/lib/R/bin/R", "srv/worker.R", "usr/lib/R/library/extra/libs/extra.so"} <= found
    assert "usr/lib/R/library/unused/R/unused.rdb" not in found
    assert "usr/lib/R/library/stats/R/stats.rdb" in followed(layers, "/usr/lib/R/bin/exec/R")


def test_erlang_reads_its_boot_file_and_the_application_that_a_variable_names(layers: list[str]) -> None:
    erlexec = "/usr/lib/erlang/erts-15.2/bin/erlexec"
    found = followed(layers, erlexec, variables=["ERL_LIBS=/opt/broker/plugins", "BOOT_MODULE=broker"])
    assert {"usr/lib/erlang/erts-15.2/bin/beam.smp", "usr/lib/erlang/lib/kernel-9.1/ebin/code.beam"} <= found
    assert {name for name in FILES if name.startswith("opt/broker/plugins/")} - found == {
        "opt/broker/plugins/other-1.0/ebin/other.app"
    }
    assert "usr/lib/erlang/lib/kernel-9.1/ebin/other.beam" not in found
    assert not any(name.startswith("opt/") for name in followed(layers, erlexec))


class NoFiles:
    """An image without files, which keeps the paths that are looked for."""

    def __init__(self) -> None:
        self.wanted: list[bytes] = []

    def real(self, path: bytes) -> None:
        if len(path) < 4096:
            self.wanted.append(path)

    search = real

    def names(self, directory: bytes) -> list[bytes]:
        return []


#: A program and the name of a source, for each language whose sources are looked through.
SOURCES = {
    b"/usr/bin/python3.11": b"/srv/app/a.py",
    b"/usr/bin/perl": b"/srv/app/a.pl",
    b"/usr/bin/ruby": b"/srv/app/a.rb",
    b"/usr/bin/node": b"/srv/app/a.js",
    b"/usr/bin/php": b"/srv/app/a.php",
    b"/usr/bin/Rscript": b"/srv/app/a.R",
}
#: Beginnings of statements, texts that are repeated behind each, and ends.
_BEGINNINGS = (
    *(b"", b"from ", b"from .", b"from a", b"import ", b"use ", b"use a", b"require", b"require a", b"require("),
    *(b"include_once __DIR__", b"include dirname(", b"include dirname(__FILE__", b"include __DIR__ . ", b"library"),
    b"library(",
)
_REPEATED = (b" ", b"\t", b".", b"a", b"A::", b"(", b"'", b"a.", b", ")
_ENDS = (b"", b" import")
#: Lengths of lines, and their numbers: some languages leave out the longest ones.
_SHAPES = ((MAX_SOURCE, 1), (4000, 16))


# With a pattern that tries all ways to divide a line, one of these takes hours instead of milliseconds.
@pytest.mark.timeout(120)
@pytest.mark.parametrize("program", SOURCES)
def test_hostile_sources_take_time_in_proportion_to_their_length(program: bytes) -> None:
    files: Any = NoFiles()
    language = language_of(files, program, {})
    assert language is not None
    for beginning in _BEGINNINGS:
        for repeated in _REPEATED:
            for end in _ENDS:
                for length, number in _SHAPES:
                    times = (length - len(beginning) - len(end)) // len(repeated)
                    lines = [beginning + times * repeated + end] * number
                    assert list(language.needed(SOURCES[program], b"\n".join(lines))) == []
                    files.wanted.clear()


def test_no_language_with_sources_is_left_out() -> None:
    files: Any = NoFiles()
    found = {type(language_of(files, each, {})) for each in SOURCES}
    assert {each.__name__ for each in set(LANGUAGES) - found} == {"Java", "Erlang"}


@pytest.mark.parametrize(
    ("program", "source", "wanted"),
    [
        (b"/usr/bin/python3.11", b"from .one import two", b"/srv/app/one/two.py"),
        (b"/usr/bin/python3.11", b"from ..one.two import (three,\n four)", b"/srv/one/two/four.py"),
        (b"/usr/bin/python3.11", b"from\t.  import two # text", b"/srv/app/two.py"),
        (b"/usr/bin/python3.11", b"from one.two  import three", b"/srv/app/one/two/three.py"),
        (b"/usr/bin/python3.11", b"import one, two.three", b"/srv/app/two/three.py"),
        (b"/usr/bin/php", b"<?php\nrequire 'a.php';", b"/srv/app/a.php"),
        (b"/usr/bin/php", b"<?php\n include_once ( 'a.inc' );", b"/srv/app/a.inc"),
        (b"/usr/bin/php", b"<?php\nrequire __DIR__ . '/a.php';", b"/srv/app/a.php"),
        (b"/usr/bin/php", b"<?php\nrequire_once(dirname( __FILE__ ).'/a.php');", b"/srv/app/a.php"),
    ],
)
def test_forms_of_imports(program: bytes, source: bytes, wanted: bytes) -> None:
    files: Any = NoFiles()
    language = language_of(files, program, {})
    assert language is not None
    assert list(language.needed(SOURCES[program], source)) == []
    assert wanted in files.wanted
