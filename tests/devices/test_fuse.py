"""Serving a FUSE connection: a simulated kernel on the other side."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from obdlab.blob import Buffer, MemoryBlob
from obdlab.call import UNBOUND, Call
from obdlab.devices import fuse
from obdlab.devices.fuse import FuseServer
from obdlab.devices.load import LOOK_EVERY, Load
from obdlab.devices.spinning import Spinning
from obdlab.errors import SourceError
from obdlab.system import abi
from obdlab.system.abi import FuseOpcode
from obdlab.system.pauses import wait_until
from tests.devices.blobs import MemoryWritable, Short, Troubled
from tests.devices.simulated import Connection, joined, write_body

DATA = bytes(range(256)) * 32
MS = 1_000_000


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


class FirstWaits(MemoryWritable):
    """Its first write waits, as for a registry, until the second one is stored."""

    def __init__(self, size: int, error: Exception | None = None) -> None:
        super().__init__(size)
        self._error = error
        self._writes = 0
        self._second = threading.Event()

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        self._writes += 1
        if self._writes == 1:
            (call or UNBOUND).about_to_wait()
            assert self._second.wait(30), "the second write never came"
            if self._error is not None:
                raise self._error
        super().write_at(offset, data, call)
        if self._writes > 1:
            self._second.set()


@pytest.mark.parametrize("error", [None, SourceError("registry answered 500", blob="sha256:12")])
def test_a_write_that_waits_keeps_its_data(error: Exception | None) -> None:
    blob = FirstWaits(8192, error)
    with joined(blob) as (connection, server):
        first = connection.ask(FuseOpcode.WRITE, write_body(512, b"a" * 512))
        second = connection.ask(FuseOpcode.WRITE, write_body(4096, b"b" * 1024))
        answers = {unique: code for unique, code, _ in (connection.answer() for _ in range(2))}
        assert answers == {first: errno.EIO if error else 0, second: 0}
        stored = bytes(512) if error else b"a" * 512
        assert bytes(blob.data) == bytes(512) + stored + bytes(3072) + b"b" * 1024 + bytes(3072)
        assert connection.write(0, b"c" * 512)[0] == 0
        assert bytes(blob.data[:512]) == b"c" * 512
        # Once it is done, its buffer goes with the lead again.
        assert wait_until(
            lambda: not any(member.needs_buffer for member in list(server._crew._members)), 30, look_s=0.01
        )


def test_a_connection_is_joined_only_where_the_kernel_can_send_again() -> None:
    assert FuseServer(MemoryBlob(DATA)).can_send_again is False
    with joined(MemoryBlob(DATA)) as (_, server):
        assert server.can_send_again is True


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


def test_a_server_is_named_after_its_blob_and_writes_where_it_may() -> None:
    assert FuseServer(MemoryBlob(DATA, "the blob")).name == "the blob"
    assert FuseServer(MemoryBlob(DATA, "the blob"), name="other").name == "other"
    assert FuseServer(MemoryWritable(512)).read_only is False
    assert FuseServer(MemoryWritable(512), read_only=True).read_only is True
    assert FuseServer(MemoryBlob(DATA)).read_only is True


def test_reads_end_with_the_blob() -> None:
    with joined(MemoryBlob(DATA)) as (connection, server):
        assert connection.read(8000, 512) == (0, DATA[8000:])
        assert connection.read(7680, 512) == (0, DATA[7680:])
        assert connection.read(8192, 512) == (0, b"")
        assert connection.read(9000, 512) == (0, b"")
        counters = server.statistics()
        assert (counters.reads, counters.read_bytes, counters.errors) == (4, 704, 0)


def test_a_read_of_too_few_bytes_is_a_bug_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with joined(Short(DATA)) as (connection, server):
        assert connection.read(512, 4096) == (errno.EIO, b"")
        wanted = "read of 4096 bytes at offset 512: RuntimeError: read_at returned 4095 of 4096 bytes"
        assert server.statistics().last_error == wanted
        assert server.statistics().errors == 1
    (record,) = [record for record in caplog.records if wanted in record.message]
    assert record.exc_info is not None


def test_an_expected_error_is_told_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with joined(Troubled(DATA, at=4096)) as (connection, server):
        assert connection.read(4096, 512) == (errno.EIO, b"")
        assert server.statistics().last_error.startswith(
            "read of 512 bytes at offset 4096: sha256:12: registry answered"
        )
    (record,) = [record for record in caplog.records if "registry answered 500" in record.message]
    assert record.exc_info is None


def test_requests_that_the_kernel_expects_no_answer_to_get_none() -> None:
    with joined(MemoryBlob(DATA)) as (connection, server):
        for opcode in (FuseOpcode.FORGET, FuseOpcode.BATCH_FORGET, FuseOpcode.INTERRUPT):
            connection.send(opcode, bytes(8))
            assert connection.read(0, 512) == (0, DATA[:512])  # the first answer is this one's
        assert connection.do(39) == (errno.ENOSYS, b"")  # IOCTL
        assert connection.do(FuseOpcode.RELEASE, bytes(24)) == (0, b"")
        assert server.statistics().errors == 0


def test_a_request_that_breaks_its_handler_is_answered() -> None:
    with joined(MemoryBlob(DATA)) as (connection, server):
        assert connection.do(FuseOpcode.READDIR, b"short") == (errno.EIO, b"")
        assert server.statistics().last_error.startswith("FUSE request 28: error: unpack_from")
        assert connection.read(0, 512) == (0, DATA[:512])


def test_durations_are_counted_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, step_ns=1000)  # a request takes one step
    with joined(MemoryWritable(8192)) as (connection, server):
        for _ in range(3):
            assert connection.read(0, 512) == (0, bytes(512))
        for _ in range(2):
            assert connection.write(0, bytes(512))[0] == 0
        assert connection.do(FuseOpcode.STATFS)[0] == 0
        assert connection.do(FuseOpcode.STATFS)[0] == 0  # by now all before have been counted
        total = server._crew.totals()
        assert (total.read_ns, total.write_ns, total.slowest_ns) == (3000, 2000, 1000)
        slot = (1000).bit_length()
        assert (total.read_times[slot], sum(total.read_times)) == (3, 3)
        assert (total.write_times[slot], sum(total.write_times)) == (2, 2)


def test_no_request_is_under_way_once_all_are_answered() -> None:
    with joined(MemoryBlob(DATA)) as (connection, server):
        assert connection.read(0, 512)[0] == 0
        deadline = time.monotonic() + 30
        while server.statistics().under_way_s and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.statistics().under_way_s == ()


def test_help_is_asked_for_while_the_load_is_high(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    looked: list[tuple[int, int]] = []

    def is_high(_: Load, requests: int, busy_ns: int) -> bool:
        looked.append((requests, busy_ns))
        return len(looked) == 2

    monkeypatch.setattr(Load, "is_high", is_high)
    monkeypatch.setattr(Spinning, "look", lambda *_: None)
    Clock(monkeypatch, step_ns=1000)
    with Connection() as connection:
        server = FuseServer(MemoryBlob(DATA), on_busy=lambda: asked.append(len(looked)))
        server.join(connection.server)
        for _ in range(3 * LOOK_EVERY):
            connection.read(0, 512)
    assert server.wait(30)
    assert looked[:2] == [(LOOK_EVERY, (LOOK_EVERY - 1) * 1000), (LOOK_EVERY, LOOK_EVERY * 1000)]
    assert asked == [2]


class Failing:
    """Has the server's reads of its connection fail as the list says, and then work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, codes: list[int]) -> None:
        self._codes, self._readv = codes, os.readv
        monkeypatch.setattr(os, "readv", self._fail)

    def _fail(self, descriptor: int, buffers: list[bytearray]) -> int:
        if self._codes:
            code = self._codes.pop(0)
            raise OSError(code, os.strerror(code))
        return self._readv(descriptor, buffers)


def test_withdrawn_requests_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, [errno.ENOENT, errno.EINTR, errno.EAGAIN])
    with joined(MemoryBlob(DATA)) as (connection, _):
        assert connection.read(0, 512) == (0, DATA[:512])


@pytest.mark.parametrize(
    ("code", "logged"), [(errno.ENODEV, False), (errno.ECONNABORTED, False), (errno.EINVAL, True)]
)
def test_serving_ends_with_the_connection(
    code: int, logged: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Failing(monkeypatch, [code])
    kernel, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = FuseServer(MemoryBlob(DATA), name="one")
    server.join(server_end.detach())
    assert server.wait(30)
    kernel.close()
    assert ("one: reading /dev/fuse: " in caplog.text) is logged


@pytest.mark.parametrize(("code", "logged"), [(errno.ENOENT, False), (errno.ENODEV, False), (errno.EINVAL, True)])
def test_answers_that_the_kernel_does_not_take_are_logged_unless_it_withdrew_the_request(
    code: int, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server = FuseServer(MemoryBlob(DATA), name="one")
    server._unanswerable(OSError(code, os.strerror(code)))
    assert ("one: answering the kernel: " in caplog.text) is logged
    for answer in (lambda: server._reply(1, b""), lambda: server._reply_error(1, errno.EIO)):
        caplog.clear()
        answer()  # there is no connection
        assert "one: answering the kernel: [Errno 9] Bad file descriptor" in caplog.text


def test_buffers_have_room_for_the_largest_request_and_their_pages_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    readv = os.readv

    def note(descriptor: int, buffers: list[bytearray]) -> int:
        lengths.append(len(buffers[0]))
        return readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", note)
    for blob, wanted in ((MemoryBlob(DATA), 8192), (MemoryWritable(8192), 80 + (1 << 20))):
        lengths.clear()
        with joined(blob) as (connection, _):
            connection.read(0, 512)
        assert set(lengths) == {wanted}
