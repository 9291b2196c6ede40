"""Serving a FUSE connection: a simulated kernel on the other side."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from obdlab.blob import Blob, MemoryBlob
from obdlab.devices import fuse
from obdlab.devices.fuse import FuseServer
from obdlab.devices.load import LOOK_EVERY
from obdlab.devices.spinning import Spinning
from obdlab.system import abi
from obdlab.system.abi import FuseOpcode
from tests.devices.blobs import MemoryWritable
from tests.devices.simulated import Connection

DATA = bytes(range(256)) * 32
MS = 1_000_000


@contextmanager
def joined(blob: Blob) -> Iterator[tuple[Connection, FuseServer]]:
    """Serve a blob over a simulated connection."""
    with Connection() as connection:
        server = FuseServer(blob, name="simulated")
        server.join(connection.server)
        yield connection, server
    assert server.wait(30)


class Clock:
    """A clock that moves on by ``step_ns`` each time it is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step_ns: int) -> None:
        self.reads = 0
        self._step_ns = step_ns
        monkeypatch.setattr(fuse, "time", SimpleNamespace(monotonic_ns=self._read))

    def _read(self) -> int:
        self.reads += 1
        return self.reads * self._step_ns


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have servers poll for a second after their first look; return the numbers of requests between looks."""
    found: list[int] = []

    def look(self: Spinning, requests: int, _: int) -> None:
        found.append(requests)
        self.limit_ns = 1000 * MS

    monkeypatch.setattr(Spinning, "look", look)
    return found


def test_writes_are_stored_and_counted() -> None:
    blob = MemoryWritable(8192)
    with joined(blob) as (connection, server):
        for offset, data in ((0, b"first"), (8187, b"last.")):
            assert connection.write(offset, data) == (0, abi.FUSE_WRITE_OUT.pack(5, 0))
        assert bytes(blob.data) == b"first" + bytes(8182) + b"last."
        counters = server.statistics()
        assert (counters.writes, counters.written_bytes, counters.errors) == (2, 10, 0)


def test_a_write_that_fails_is_answered_and_others_are_served() -> None:
    with joined(MemoryBlob(DATA)) as (connection, server):
        assert connection.write(0, b"x" * 512) == (errno.EROFS, b"")
        assert connection.read(512, 4096) == (0, DATA[512:4608])
        counters = server.statistics()
        assert (counters.writes, counters.reads, counters.errors) == (0, 1, 1)
        assert counters.last_error.startswith("write of 512 bytes at offset 0: ")


def test_a_connection_is_joined_only_where_the_kernel_can_send_again() -> None:
    assert FuseServer(MemoryBlob(DATA)).can_send_again is False
    with joined(MemoryBlob(DATA)) as (_, server):
        assert server.can_send_again is True


def test_the_kernel_forgets_the_attributes_of_the_file_and_no_data() -> None:
    with joined(MemoryBlob(DATA)) as (connection, server):
        server.forget_size()
        # Length, code 2 (FUSE_NOTIFY_INVAL_INODE), no request; inode, negative offset: attributes only, length.
        assert connection.notice() == struct.pack("=IiQ", 40, 2, 0) + struct.pack("=Qqq", 2, -1, 0)


def test_the_end_of_a_connection_is_seen_from_its_descriptor() -> None:
    with joined(MemoryBlob(DATA)) as (connection, _):
        another = os.dup(connection.server)
        assert not fuse.has_ended(another)
    try:
        assert fuse.has_ended(another)
    finally:
        os.close(another)


@pytest.mark.usefixtures("looks")
def test_a_server_that_polls_takes_a_request_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, step_ns=0)  # polling does not end by itself
    with joined(MemoryBlob(DATA)) as (connection, _):
        for _ in range(2 * LOOK_EVERY):
            assert connection.read(0, 512) == (0, DATA[:512])


def test_a_server_looks_at_its_times_after_so_many_requests(looks: list[int]) -> None:
    with joined(MemoryBlob(DATA)) as (connection, _):
        for _ in range(LOOK_EVERY - 2):  # the server may be one request further
            connection.do(FuseOpcode.STATFS)
        assert looks == []
        for _ in range(LOOK_EVERY + 2):
            connection.do(FuseOpcode.STATFS)
        assert looks == [LOOK_EVERY] * 2


@pytest.mark.usefixtures("looks")
def test_a_server_polls_for_its_time_before_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, step_ns=MS)
    with joined(MemoryBlob(DATA)) as (connection, _):
        for _ in range(LOOK_EVERY):
            connection.read(0, 512)
        deadline = time.monotonic() + 30
        while clock.reads < 2 * LOOK_EVERY + 1000 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert clock.reads >= 2 * LOOK_EVERY + 1000  # two for each request, one for each millisecond
        assert connection.read(512, 512) == (0, DATA[512:1024])
