"""What a start will read, derived from an image's configuration: followed as the kernel and the loader do."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.cli.main import main
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.errors import FormatError
from obdlab.formats import oci
from obdlab.formats.trace import Trace
from obdlab.layerfiles.disks import open_disk
from obdlab.settings.settings import Settings
from obdlab.traces import imagefiles, likely
from obdlab.traces.likely import Suggested, suggest
from obdlab.traces.sectors import sectors_of_reads
from obdlab.traces.sets import coverage
from obdlab.volumes.elf import read_linked
from obdlab.volumes.places import files_of
from tests.convert.layouts import hardlink, make_layout, member, symlink

PROGRAM = Path("/usr/bin/env")


def libraries() -> list[str]:
    """What this machine's own loader says that PROGRAM loads: an oracle."""
    text = subprocess.run(["ldd", PROGRAM], capture_output=True, text=True, check=True).stdout
    return [word for word in text.split() if word.startswith("/")]


class Place:
    """An image with a script, PROGRAM and its libraries, and files that no start reads."""

    def __init__(self, root: Path) -> None:
        files = [member(name.lstrip("/"), Path(name).read_bytes(), mode=0o755) for name in libraries()]
        layer = [
            *files,
            member("usr/bin/env", PROGRAM.read_bytes(), mode=0o755),
            member("start.sh", b'#!/usr/bin/env -S  true\nexec "$@"\n', mode=0o755),
            member("broken", b"\x7fELF" + bytes(100), mode=0o755),
            member("large", b"#!/none\n" + b"x" * (5 << 20), mode=0o755),
            member("etc/passwd", b"root:x:0:0::/:/bin/sh\n"),
            member("etc/ld.so.cache", b"c" * 5000),
            member("unread", b"u" * 100_000),
            member("other/libc.so.6", b"\x7fELF\x01\x01" + bytes(200), mode=0o755),  # of a processor of 32 bits
            member("opt/app/run.sh", b'. "$(dirname "$0")/env.sh"\nexec "$PLACE/env" -i "$@"\n', mode=0o755),
            member("opt/app/both.sh", b"A=$(dirname $0)/bin\nPATH=$A:$PATH\nrun-it\n"),
            member("opt/app/bin/run-it", b"#!/bin/sh\n. /unread\n", mode=0o755),
            member("opt/app/env.sh", b": ${PLACE=/usr/bin}\nLD_LIBRARY_PATH=/opt/app/lib\n"),
            *(
                member(f"chain/{each}", f"#!/bin/sh\n. /chain/s{each}\n/chain/{each + 1}\n".encode(), mode=0o755)
                for each in range(200)
            ),
            *(member(f"chain/s{each}", f". /chain/s{each + 1}\n".encode()) for each in range(200)),
            member("data/one", b"d" * 100_000),
            hardlink("data/two", "data/one"),
            symlink("usr/local/bin/run", "../../bin/env"),
            symlink("bin/sh", "../usr/bin/env"),  # the image's command
            symlink("loop", "loop"),
        ]
        source = make_layout(root / "source", [layer])
        self.name = f"oci:{root / 'image'}:v1"
        options = ["-q", "--database", "none", "--work-dir", str(root), "--vsize-gib", "1"]
        assert main(["image", "convert", *options, f"oci:{source.root}", self.name]) == 0
        layout = ImageLayout(root / "image")
        (entry,) = layout.select("v1")
        manifest = oci.Manifest.parse(layout.read_blob(entry, 1 << 20))
        self.layers = [str(layout.blob_path(each.digest)) for each in manifest.layers]

    def suggested(self, **config: Any) -> tuple[Suggested, dict[bytes, tuple[int, int]]]:
        """What is suggested, and bytes read and size of each file in its trace."""
        with open_disk(self.layers, Settings()) as disk:
            found = suggest(disk, {"config": config})
            return found, files_of(sectors_of_reads(found.trace.reads(), disk), disk).files


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("likely"))


def test_the_loader_and_its_libraries_are_those_that_the_loader_names(place: Place) -> None:
    found, read = place.suggested(Entrypoint=["/usr/bin/env"])
    others = {b"/usr/bin/env", b"/etc/ld.so.cache", b"/etc/passwd"}
    assert set(found.files) == {name.encode() for name in libraries()} | others
    assert found.files[0] == b"/usr/bin/env"
    assert not found.left_out
    assert b"/unread" not in read
    for name in found.files:
        done, size = read[name]
        assert done >= size


@pytest.mark.parametrize(
    ("config", "first"),
    [
        ({"Entrypoint": ["/start.sh"]}, [b"/start.sh", b"/usr/bin/env"]),
        ({"Cmd": ["env"]}, [b"/usr/bin/env"]),
        ({"Cmd": ["run"]}, [b"/usr/bin/env"]),
        ({"Cmd": ["run"], "Env": ["PATH=/nowhere"]}, []),
        ({"Cmd": ["./start.sh"], "WorkingDir": "/"}, [b"/start.sh"]),
        ({"Entrypoint": ["/start.sh"], "Cmd": ["run"]}, [b"/start.sh", b"/usr/bin/env"]),
        ({"Cmd": ["/none", "-c", "exec env"]}, [b"/usr/bin/env"]),
        ({"Cmd": ["/none", "-c", "A=/usr; exec $A/bin/env"]}, [b"/usr/bin/env"]),
    ],
)
def test_programs_are_found_as_execve_finds_them(place: Place, config: dict[str, Any], first: list[bytes]) -> None:
    found, _ = place.suggested(**config)
    assert list(found.files[: len(first)]) == first
    assert bool(found.files) == bool(first)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"Entrypoint": "text", "Cmd": [1, None], "Env": {"a": 1}, "WorkingDir": 5},
        {"Cmd": ["/loop"]},
        {"Cmd": ["/etc"]},
        {"Cmd": ["a\0b"]},
        {"Cmd": ["/" + "x/" * 5000]},
        {"Cmd": ["none", "-c", "'open"]},
        {"Cmd": ["/\ud800"], "Env": ["A=\ud800"], "WorkingDir": "/\ud800"},
    ],
)
def test_configurations_without_a_program_suggest_none(place: Place, config: dict[str, Any]) -> None:
    assert not place.suggested(**config)[0].files


def test_scripts_are_followed_through_variables_and_sourced_files(place: Place) -> None:
    found, _ = place.suggested(Cmd=["/bin/sh", "/opt/app/run.sh"])
    listed = list(found.files)
    assert listed.index(b"/opt/app/run.sh") < listed.index(b"/opt/app/env.sh")
    found, _ = place.suggested(Cmd=["sh", "/opt/app/both.sh"], Env=["PATH=/bin"])
    assert b"/usr/bin/env" in found.files
    assert b"/unread" in found.files  # by the search path that the script made


def test_scripts_that_start_each_other_for_ever_end(place: Place) -> None:
    found, _ = place.suggested(Cmd=["/chain/0"])
    assert b"/chain/3" in found.files
    assert b"/chain/150" not in found.files
    assert any("others one after another" in reason for reason in found.left_out)


def test_a_library_for_other_processors_is_passed_over(place: Place) -> None:
    found, _ = place.suggested(Entrypoint=["/usr/bin/env"], Env=["LD_LIBRARY_PATH=/other"])
    assert b"/other/libc.so.6" not in found.files
    assert {name.encode() for name in libraries()} <= set(found.files)


def test_malformed_programs_are_reported_and_large_files_read_in_part(place: Place) -> None:
    found, _ = place.suggested(Cmd=["/broken"])
    assert any("malformed ELF" in reason and "/broken" in reason for reason in found.left_out)
    _, read = place.suggested(Cmd=["/large"])
    assert read[b"/large"][0] <= 256 << 10


def test_it_is_the_same_each_time_and_has_no_byte_twice(place: Place) -> None:
    one, other = (place.suggested(Entrypoint=["/start.sh"])[0].trace for _ in range(2))
    assert one.to_bytes() == other.to_bytes()
    assert sum(end - begin for ranges in coverage(one).values() for begin, end in ranges) == one.size


def test_the_command_writes_a_trace_that_is_read_again(
    place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "trace"
    assert main(["trace", "suggest", place.name, "-o", str(output), "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["files"][0] == "/usr/bin/env"
    assert printed["left_out"] == []
    assert printed["size"] == Trace.from_bytes(output.read_bytes()).size


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), max_size=12), st.integers(0, 70_000))
def test_damaged_programs_end_in_a_format_error_or_in_names(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(PROGRAM.read_bytes())
    for at, value in changes:
        data[at] = value
    data = data[: max(64, len(data) - cut)]
    try:
        found = read_linked(lambda at, length: bytes(data[at : at + length]), len(data), name="p")
    except FormatError:
        return
    assert len(found.needed) <= 4096


@pytest.mark.parametrize(("bound", "reason"), [("MAX_S", "takes too long"), ("MAX_READ", "too many reads")])
def test_the_work_for_one_image_is_bounded(
    place: Place, monkeypatch: pytest.MonkeyPatch, bound: str, reason: str
) -> None:
    monkeypatch.setattr(imagefiles, bound, -1)
    with pytest.raises(FormatError, match=reason):
        place.suggested(Entrypoint=["/usr/bin/env"])


def test_headers_that_claim_to_be_endless_are_refused() -> None:
    data = bytearray(PROGRAM.read_bytes())
    data[0x38:0x3A] = (60000).to_bytes(2, "little")
    with pytest.raises(FormatError, match="too many segments"):
        read_linked(lambda at, length: bytes(data[at : at + length]), len(data), name="p")


def test_paths_that_are_looked_for_are_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagefiles, "_MAX_LOOKUPS", 100)
    with open_disk(place.layers, Settings()) as disk:
        files = imagefiles.ImageFiles(disk)
        assert files.real(b"/unread") == b"/unread"
        for number in range(10_000):
            assert files.search(b"/usr/module%d/__init__.py" % number) is None
            assert not files.open_directory(b"/usr/module%d" % number)
        assert len(files._found) <= 100
        assert len(files._walked) <= 100
        assert files.real(b"/unread") == b"/unread"
        # Names that are kept need no read; following them ends all the same.
        files._deadline = 0.0
        for look in (files.real, files.names):
            with pytest.raises(FormatError, match="takes too long"):
                look(b"/unread")


def test_long_paths_are_not_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagefiles, "_MAX_LOOKUPS", 1000)
    with open_disk(place.layers, Settings()) as disk:
        files = imagefiles.ImageFiles(disk)
        for number in range(1000):
            assert files.search(b"/%d/" % number + b"x" * (1 << 20)) is None
            assert files.search(b"/%d/" % number + b"x/" * 2000) is None
        for kept in (files._found, files._walked):
            assert sum(map(len, kept)) < 1000 * 256


def test_noted_ranges_are_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_disk(place.layers, Settings()) as disk:
        files = imagefiles.ImageFiles(disk)
        path = files.real(b"/unread")
        assert path is not None
        monkeypatch.setattr(imagefiles, "_MAX_RANGES", len(files.ranges) + 10)
        for _ in range(10):
            files.note(path, 0, 4096)
        with pytest.raises(FormatError, match="too many reads"):
            files.note(path, 0, 4096)
        assert len(files.ranges) == imagefiles._MAX_RANGES
        with pytest.raises(FormatError, match="too many reads"):
            files.open(path)


def test_a_program_of_names_alone_is_read_up_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    class Counting:
        def finditer(self, data: bytes) -> Iterator[re.Match[bytes]]:
            for match in named.finditer(data):
                taken.append(match)
                yield match

    named = likely._NAMED
    monkeypatch.setattr(likely, "_NAMED", Counting())
    names = [b"/etc/name%d" % number for number in range(5000)]
    assert likely._names_in_data(b"\0".join([names[0], *names])) == names[:1024]
    assert len(taken) == 1025
