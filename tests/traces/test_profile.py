"""A profile learned from starts: what it keeps, what it suggests, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from obdlab.cli.main import main
from obdlab.errors import FormatError
from obdlab.formats.trace import Trace
from obdlab.layerfiles.disks import open_disk
from obdlab.settings.settings import Settings
from obdlab.traces.fit import Link, data_of, fit
from obdlab.traces.learning import example_of, learn
from obdlab.traces.likely import suggest
from obdlab.traces.profile import MAX_SIZE, PAGE, File, Profile, Read, key_of, own_profile
from obdlab.traces.replay import reads_of_disk
from obdlab.traces.sectors import sectors_of_reads
from obdlab.volumes.places import FilePlaces, files_of
from tests.traces.test_likely import Place

DOCUMENT: dict[str, Any] = {"config": {"Entrypoint": ["/usr/bin/env"]}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("profile"))


def start_with_a_part_of(place: Place, name: bytes) -> bytes:
    """A trace of all that is suggested, and of the second to fifth page of another file."""
    with open_disk(place.layers, Settings()) as disk:
        reads = suggest(disk, DOCUMENT).trace.reads()
        where = next(at for path, _, size, places in _walk(disk) if path == name for _, _, at in places)
        reads += list(reads_of_disk(disk, where + PAGE, 4 * PAGE))
        return Trace.from_reads(reads).to_bytes()


def _walk(disk: Any) -> Any:
    from obdlab.volumes.places import FileVolume

    return FileVolume(disk).walk()


def test_a_read_counts_for_every_name_of_a_file(place: Place) -> None:
    trace = start_with_a_part_of(place, b"/data/one")
    with open_disk(place.layers, Settings()) as disk:
        example = example_of("one", disk, DOCUMENT, trace)
        assert FilePlaces(disk).links() == dict.fromkeys((b"/data/one", b"/data/two"), (b"/data/one", b"/data/two"))
    assert example.reads["/data/one"] == example.reads["/data/two"]
    assert example.reads["/data/one"][2] == ((1, 5),)


def test_a_file_that_no_text_names_is_suggested_by_what_another_start_read(place: Place) -> None:
    trace = start_with_a_part_of(place, b"/unread")
    with open_disk(place.layers, Settings()) as disk:
        profile = learn([example_of("one", disk, DOCUMENT, trace)])
        profile = Profile.from_bytes(profile.to_bytes())
        without, found = suggest(disk, DOCUMENT), suggest(disk, DOCUMENT, profile)
        assert b"/unread" not in without.files
        assert b"/unread" in found.files
        assert files_of(sectors_of_reads(found.trace.reads(), disk), disk).files[b"/unread"][0] == 4 * PAGE
        # An image that starts something else is not like it.
        other = {"config": {"Entrypoint": ["/broken"]}}
        assert b"/unread" not in suggest(disk, other, profile).files
        assert not profile.without("one").files


def test_a_file_that_starts_do_not_read_is_left_out(place: Place) -> None:
    with open_disk(place.layers, Settings()) as disk:
        places = FilePlaces(disk)
        kept = [
            (begin, end)
            for begin, end in sectors_of_reads(suggest(disk, DOCUMENT).trace.reads(), disk)
            if all(path != b"/etc/passwd" for path, _, _ in places.files_in(begin * 512, end * 512))
        ]
        trace = Trace.from_reads(r for b, e in kept for r in reads_of_disk(disk, b * 512, (e - b) * 512)).to_bytes()
        examples = [example_of(str(number), disk, DOCUMENT, trace) for number in range(3)]
        assert b"/etc/passwd" in suggest(disk, DOCUMENT).files
        assert b"/etc/passwd" not in suggest(disk, DOCUMENT, learn(examples)).files


def test_a_suggestion_that_is_the_recording_keeps_all_of_its_gain(place: Place) -> None:
    with open_disk(place.layers, Settings()) as disk:
        recorded = data_of(suggest(disk, DOCUMENT).trace, disk)
        same, nothing = fit(recorded, recorded), fit(recorded, Trace.from_reads([]))
        link = Link(100, 20, 0.4)
        assert (same.over_read, same.covered, same.requests_with) == (1, same.recorded, 0)
        assert same.kept(link) == pytest.approx(1)
        assert nothing.covered == 0
        assert nothing.requests_with == same.requests_without > 0


def test_the_command_learns_from_a_trace_and_suggests_by_it(place: Place, tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(start_with_a_part_of(place, b"/unread"))
    profile, output = str(tmp_path / "profile"), str(tmp_path / "likely")
    assert main(["trace", "learn", "-q", "--example", place.name, str(tmp_path / "trace"), "-o", profile]) == 0
    assert main(["trace", "suggest", place.name, "-o", output, "--profile", profile]) == 0
    sizes = [Trace.from_bytes(Path(output).read_bytes()).size]
    assert main(["trace", "suggest", place.name, "-o", output, "--profile", "none"]) == 0
    assert Trace.from_bytes(Path(output).read_bytes()).size != sizes[0]
    assert main(["trace", "learn", "-o", profile]) == 1


def packed(value: Any) -> bytes:
    return zstandard.ZstdCompressor().compress(msgspec.json.encode(value))


SOUND: dict[str, Any] = {"format": "obdlab start profile 1", "made": "", "examples": ["a"], "files": []}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "malformed profile"),
        (b"text", "not in zstd"),
        (bytes(MAX_SIZE + 1), "too large"),
        (zstandard.ZstdCompressor().compress(bytes(33 << 20)), "unpacked"),
        (packed([]), "malformed profile"),
        (packed(SOUND | {"format": "other"}), "unknown profile"),
        (packed(SOUND | {"files": [["/a", [1], [], []]]}), "example that it lacks"),
        (packed(SOUND | {"files": [["/a", [-1], [], []]]}), "malformed profile"),
        (packed(SOUND | {"files": [["/a", [0], [], [[0, 1 << 60, 0, []]]]]}), "malformed profile"),
        (packed(SOUND | {"files": [["/a", [0], [], [[0, 5, 0, [0, 1 << 40]]]]]}), "malformed profile"),
    ],
)
def test_malformed_profiles_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        Profile.from_bytes(data)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=9))
def test_a_profile_is_the_same_after_writing_and_reading(runs: list[tuple[int, int]]) -> None:
    file = File("/a/b1", [0], [0], [Read(0, 1 << 20, 7, [part for run in runs for part in run])])
    again = Profile.from_bytes(Profile(["one"], [file], made="so").to_bytes())
    assert (again.examples, again.files, again.made) == (("one",), (file,), "so")
    assert sum(end - begin for begin, end in again.files[0].reads[0].ranges()) == sum(length for _, length in runs)


def test_versions_do_not_matter() -> None:
    assert key_of("/usr/lib/python3.11/os.py") == key_of("/usr/lib/python3.13/os.py")


def test_the_own_profile_can_be_read() -> None:
    assert len(own_profile().examples) >= 16
