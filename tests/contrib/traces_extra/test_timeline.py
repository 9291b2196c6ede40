"""From block events to files, layers and waits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from obdlab.call import Call
from obdlab.cli.main import main
from obdlab.contrib.traces_extra.blockevents import DiskRead
from obdlab.contrib.traces_extra.timeline import (
    Share,
    Step,
    by_kind,
    check_inside,
    frame,
    kind_of,
    summary,
    timeline,
    trace_of,
)
from obdlab.errors import FormatError
from obdlab.formats.trace import Trace
from obdlab.image.open import open_stack
from obdlab.layers.stack import Stack
from obdlab.traces.sets import coverage
from obdlab.volumes.ext4.volume import Volume
from tests.layers.golden import GOLDEN

EXT4 = [GOLDEN / "ext4" / "layer1.obd", GOLDEN / "ext4" / "layer2.obd"]


def a_file(disk: Stack) -> tuple[bytes, int, int]:
    """Path, offset on the disk and size in whole blocks of the largest file."""
    volume = Volume(disk)
    size, path, inode = max(
        ((inode.size, path, inode) for path, _, inode in volume.walk()), key=lambda each: each[:2]
    )
    extent = volume.extents(inode)[0]
    assert size > 4096
    return path, extent.physical * volume.block_size, min(extent.length, 16) * volume.block_size


def reads_for(disk: Stack) -> list[DiskRead]:
    _, offset, size = a_file(disk)
    return [
        DiskRead(10.0, 0.0001, 1024 // 4096, 4096, "mount", 5, False),
        DiskRead(10.010, 0.050, offset, size, "cat", 6, False),
        DiskRead(10.040, 0.040, offset + size, 4096, "cat", 6, True),
        DiskRead(10.200, None, 0, 4096, "cat", 6, False),
    ]


def test_the_trace_is_what_the_disk_reads_of_its_layers() -> None:
    with open_stack(EXT4) as disk:
        reads = reads_for(disk)
        trace = trace_of(reads, disk)
        seen: list[tuple[int, int, int]] = []

        def watch(layer: int, read_at: object) -> object:
            def read(offset: int, length: int, call: Call | None = None) -> bytes:
                seen.append((layer, offset, length))
                return read_at(offset, length, call)  # type: ignore[operator, no-any-return]

            return read

        disk.watch(watch)  # type: ignore[arg-type]
        for read in reads:
            disk.read_at(read.offset, read.length)
        disk.watch(None)
        assert coverage(trace) == coverage(Trace.from_reads(seen))
        trace.check_fits([layer.data.size for layer in disk.layers])


def test_steps_name_files_layers_and_waits() -> None:
    with open_stack(EXT4) as disk:
        path, offset, size = a_file(disk)
        reads = reads_for(disk)
        steps = timeline(reads, disk)
        (of_file,) = [step for step in steps if step.path == path and step.offset == offset]
        assert of_file.length == size
        assert of_file.at_ms == pytest.approx(10)
        assert of_file.layers
        assert (of_file.state, of_file.process, of_file.in_trace) == ("waited", "cat", None)
        assert [step.state for step in steps if step.at_ms == 0] == ["there"]
        assert steps[-1].state == "untold"
        assert sum(step.length for step in steps) == sum(read.length for read in reads)
        facts = summary(steps, disk)
        assert (facts.reads, facts.processes, facts.coverage) == (4, 2, None)
        assert facts.waited_ms == pytest.approx(70)  # two that overlap
        assert 0 < facts.stored_size <= facts.size
        assert facts.optimum_ms(100, 20) == pytest.approx(20 + facts.stored_size * 8 / 100e3)
        table = frame(steps)
        assert list(table["process"]) == [step.process for step in steps]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (None, "metadata"),
        (b"", "application"),
        (b"/etc/ld.so.cache", "loader"),
        (b"/lib64/ld-linux-x86-64.so.2", "loader"),
        (b"/lib/ld-musl-x86_64.so.1", "loader"),
        (b"/usr/lib/libc.so.6", "libraries"),
        (b"/usr/lib/python3/lib-dynload/_ssl.so", "libraries"),
        (b"/usr/bin/ld", "application"),
        (b"/srv/a.sorted", "application"),
    ],
)
def test_the_kinds_of_files(path: bytes | None, kind: str) -> None:
    assert kind_of(path) == kind


def test_a_start_is_divided_by_kinds() -> None:
    def step(at_ms: float, took_ms: float | None, path: bytes | None, state: str) -> Step:
        return Step(at_ms, took_ms, 0, 4096, (0,), path, "x", 1, False, None, state)

    steps = [
        step(0, 5, b"/lib/a.so", "waited"),
        step(3, 5, b"/lib/b.so.1", "waited"),
        step(3, 40, b"/lib/b.so.1", "there"),
        step(4, 10, b"/bin/x", "late"),
        step(5, None, None, "untold"),
    ]
    assert by_kind(steps) == {
        "metadata": Share(1, 4096, 0),
        "loader": Share(0, 0, 0),
        "libraries": Share(3, 3 * 4096, 8),
        "application": Share(1, 4096, 10),
    }


def test_with_a_trace_what_came_in_time_what_late_and_what_not() -> None:
    with open_stack(EXT4) as disk:
        reads = reads_for(disk)
        _, offset, size = a_file(disk)
        trace = trace_of(reads[:2], disk)
        states = {(step.offset, step.state) for step in timeline(reads, disk, trace)}
        assert {(0, "prefetched"), (offset, "late"), (offset + size, "missed")} <= states
        half = trace_of([DiskRead(0, None, offset, size // 2, "", 0, False)], disk)
        facts = summary(timeline(reads[1:2], disk, half), disk, half)
        assert facts.coverage == pytest.approx(0.5, abs=0.05)
        assert facts.over_read == 0
        nothing_of_it = summary(timeline(reads[:1], disk, half), disk, half)
        assert (nothing_of_it.coverage, nothing_of_it.over_read) == (0, 1)


def test_reads_of_another_disk_are_refused() -> None:
    with open_stack(EXT4) as disk, pytest.raises(FormatError, match="not of this image"):
        check_inside([DiskRead(0, None, disk.size - 512, 1024, "", 0, False)], disk.size)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_stack(EXT4) as disk:
        path, offset, size = a_file(disk)
    events = tmp_path / "events"
    events.write_text(
        f" cat-6 [000] ..... 1.000: block_rq_issue: 7,0 R {size} () {offset // 512} + {size // 512} none,0,0 [cat]\n"
        f" x-0 [000] ..... 1.030: block_rq_complete: 7,0 R () {offset // 512} + {size // 512} none,0,0 [0]\n"
    )
    image = [",".join(map(str, EXT4)), "--run-dir", str(tmp_path / "run")]
    assert main(["trace", "import", str(events), *image, "-o", str(tmp_path / "trace")]) == 0
    assert Trace.from_bytes((tmp_path / "trace").read_bytes()).size > 0
    replayed = ["--trace", str(tmp_path / "trace"), "--rate-mbit", "100", "--rtt-ms", "20"]
    assert main(["trace", "timeline", str(events), *image, *replayed]) == 0
    told = capsys.readouterr().out
    assert f"30.00 late {offset:>19} {size:>9} cat" in told
    assert path.decode() in told
    assert "the trace had 100.0% of the bytes read; 0.0% of the trace was not read" in told
    assert told.count("waited for 30.0 ms") == 1
    assert main(["trace", "timeline", str(events), *image, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["summary"]["waited_ms"] == pytest.approx(30)
    assert facts["steps"][0]["path"] == path.decode()
    assert facts["kinds"][kind_of(path)] == {"steps": 1, "size": size, "waited_ms": pytest.approx(30)}
    assert main(["trace", "timeline", str(events), *image, "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("at_ms,took_ms,offset")
    assert main(["trace", "timeline", str(events), *image, "--block-device", "8:0"]) == 1
    assert "no reads of the device" in capsys.readouterr().err
    assert main(["trace", "import", str(EXT4[0]), *image, "-o", str(tmp_path / "no")]) == 1
    assert "no block events" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
