"""The audit log: what a line has, what it must not have, and that it breaks nothing."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.observe import audit

LINE = re.compile(
    r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{6}\|AUDIT\|redis\|"
    r"\[action=(?P<action>[\w:]+)\]\[pathname=(?P<path>[^\]]*)\]\[offset=(?P<offset>\d+)\]\[size=(?P<size>\d+)\]"
    r"\[latency_us=(?P<latency>\d+)\]"
)


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    audit.configure(None)


def test_lines(tmp_path: Path) -> None:
    audit.configure(tmp_path / "audit.log", who="redis")
    audit.record("download", "http://r/v2/x/blobs/sha256:00", 4096, 65536, time.monotonic() - 0.25)
    audit.record_values("eviction", actualEvict=5, totalUsed=7)
    first, second = (tmp_path / "audit.log").read_text().splitlines()
    match = LINE.fullmatch(first)
    assert match is not None
    assert match.group("action", "path", "offset", "size") == (
        "download",
        "http://r/v2/x/blobs/sha256:00",
        "4096",
        "65536",
    )
    assert 250_000 <= int(match["latency"]) < 60_000_000
    assert second.endswith("|AUDIT|redis|[action=eviction][actualEvict=5][totalUsed=7]")
    assert (tmp_path / "audit.log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ("https://user:secret@cdn/blob?X-Amz-Signature=secret#secret", "https://cdn/blob"),
        ("https://[::1]:5000/x?sig=secret", "https://?::1?:5000/x"),
        ("/a\nb[action=forged]", "/a?b?action=forged?"),
        ("http://[broken?secret", "unusable URL"),
    ],
)
def test_no_secret_and_no_forged_line(tmp_path: Path, path: str, written: str) -> None:
    audit.configure(tmp_path / "audit.log", who="redis")
    audit.record("download", path, 0, 1, time.monotonic())
    text = (tmp_path / "audit.log").read_text()
    assert f"[pathname={written}]" in text
    assert text.count("\n") == 1
    assert "secret" not in text


def test_only_slow_reads_are_written(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"0123456789")
    assert audit.pread_of("file:read", "data", 0.0) is os.pread, "free of cost when off"
    audit.configure(tmp_path / "audit.log", who="redis")
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    try:
        assert audit.pread_of("file:read", "data", 3600.0)(fd, 4, 2) == b"2345"
        assert not (tmp_path / "audit.log").exists()
        assert audit.pread_of("file:read", "data", 0.0)(fd, 4, 2) == b"2345"
    finally:
        os.close(fd)
    assert "[action=file:read][pathname=data][offset=2][size=4]" in (tmp_path / "audit.log").read_text()


def test_a_disk_that_fails_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    audit.configure(tmp_path / "none" / "audit.log", who="redis")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            audit.record("download", "x", 0, 1, time.monotonic())
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/none/audit.log: audit log cannot be written: No such file or directory"
    ]
