"""One command at a time through a TCMU server that has no thread: counters, notices to the kernel, and buffers."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from obdlab.blob import Blob, MemoryBlob
from obdlab.devices.crew import Member
from obdlab.devices.tcmu import scsi
from obdlab.devices.tcmu import server as module
from obdlab.devices.tcmu.disk import ScsiDisk
from obdlab.devices.tcmu.ring import TAIL_AT
from obdlab.devices.tcmu.scsi import ScsiError, Sense
from obdlab.devices.tcmu.server import TcmuServer
from obdlab.errors import SourceError
from obdlab.system import pauses
from tests.devices.blobs import MemoryWritable, Short, Troubled
from tests.devices.tcmu.simulated import KernelRing, read_10, read_16, write_10

KIB = 1 << 10
DATA = bytes(range(256)) * 4096


class Stepped:
    """A server whose commands the test takes and answers itself; its clock moves by a step with each reading."""

    def __init__(self, blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = KernelRing()
        disk = ScsiDisk(blob, serial="0" * 32, description="d")
        self.server = TcmuServer(self.kernel.memory, self.kernel.event, disk, name="one")
        self.member = Member(leading=True)
        self.notices = 0
        self._now = 0
        monkeypatch.setattr(module, "_clock", self._clock)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic_ns=self._clock))
        notify = self.server._notify
        monkeypatch.setattr(self.server, "_notify", lambda: self._note() or notify())

    def _clock(self) -> int:
        self._now += 1000
        return self._now

    def _note(self) -> None:
        self.notices += 1

    def do(self, cdb: bytes, data: bytes = b"", room: int = 0, **options: bool) -> int:
        """Take one command and do it; return its number."""
        number = self.kernel.put(cdb, data, room, **options)
        self.kernel.publish()
        (command,) = self.server._ring.take()
        if len(command) == 5:
            self.server._read(self.member, command)
        else:
            self.server._serve(self.member, command)
        assert self.member.since_ns == 0
        return number

    def pending(self) -> int:
        return self.server._unnotified


@pytest.fixture
def blob() -> Blob:
    return MemoryWritable(1 << 20)


@pytest.fixture
def stepped(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stepped]:
    found = Stepped(blob, monkeypatch)
    yield found
    os.close(found.server._wake)
    found.kernel.close()


def test_reads_in_one_piece_are_counted(stepped: Stepped) -> None:
    stepped.do(read_10(0, 8), room=4096)
    stepped.do(read_10(8, 1), room=512)
    member = stepped.member
    assert (member.reads, member.read_bytes, member.read_ns, member.slowest_ns) == (2, 4608, 2000, 1000)
    assert (member.read_times[10], sum(member.read_times), sum(member.write_times)) == (2, 2, 0)
    assert (stepped.pending(), stepped.notices) == (4608 + 2, 0)
    assert len(stepped.server._ring.finished) == 2


@pytest.mark.parametrize("cdb", [read_16(0, 8), read_10(0, 8)], ids=["16", "10, with more room"])
def test_other_reads_are_counted_in_the_same_way(stepped: Stepped, cdb: bytes) -> None:
    stepped.do(cdb, room=8192)
    member = stepped.member
    assert (member.reads, member.read_bytes, member.read_ns, member.slowest_ns) == (1, 4096, 1000, 1000)
    assert (member.read_times[10], sum(member.read_times), sum(member.write_times)) == (1, 1, 0)
    assert (stepped.pending(), stepped.notices) == (4096 + 1, 0)


def test_writes_are_counted(stepped: Stepped) -> None:
    stepped.do(write_10(0, 8), DATA[:4096])
    stepped.do(write_10(8, 8), DATA[4096:8192], scattered=True)
    member = stepped.member
    assert (member.writes, member.written_bytes, member.write_ns, member.slowest_ns) == (2, 8192, 2000, 1000)
    assert (member.write_times[10], sum(member.write_times), sum(member.read_times)) == (2, 2, 0)
    assert (stepped.pending(), stepped.notices) == (8192 + 2, 0)
    assert [answer.read_length for answer in stepped.kernel.answers().values()] == [None, None]


def test_the_slowest_request_stays_the_slowest(stepped: Stepped) -> None:
    stepped.member.slowest_ns = 5000
    for cdb, data, room in ((read_10(0, 8), b"", 4096), (read_16(0, 8), b"", 4096), (write_10(0, 1), bytes(512), 0)):
        stepped.do(cdb, data, room)
        assert stepped.member.slowest_ns == 5000


@pytest.mark.parametrize("sixteen", [False, True])
def test_the_kernel_hears_of_answers_after_256_kib(stepped: Stepped, sixteen: bool) -> None:
    read = read_16 if sixteen else read_10
    stepped.do(read(0, 510), room=510 * 512)
    assert (stepped.pending(), stepped.notices) == (510 * 512 + 1, 0)
    stepped.do(read(0, 1), room=512)
    assert (stepped.pending(), stepped.notices) == (511 * 512 + 2, 0)
    stepped.do(read(0, 1), room=512)
    assert (stepped.pending(), stepped.notices) == (0, 1)
    assert stepped.kernel.answers().keys() == {1, 2, 3}


def test_exactly_256_kib_can_wait(stepped: Stepped) -> None:
    stepped.server._unnotified = 256 * KIB - 513
    stepped.do(read_10(0, 1), room=512)
    assert (stepped.pending(), stepped.notices) == (256 * KIB, 0)
    stepped.server._unnotified = 256 * KIB - 513
    stepped.do(write_10(0, 1), bytes(512))
    assert (stepped.pending(), stepped.notices) == (256 * KIB, 0)
    stepped.do(bytes(6))
    assert (stepped.pending(), stepped.notices) == (0, 1)


def test_an_answer_fills_all_pieces_of_a_buffer(stepped: Stepped) -> None:
    memory, data = stepped.kernel.memory, stepped.kernel.data
    memory[data : data + 32] = b"\xee" * 32
    pieces = ((data, 4), (data + 8, 4), (data + 16, 8))
    assert stepped.server._scatter(b"abcdef", pieces) == 6
    assert memory[data : data + 32] == b"abcd" + b"\xee" * 4 + b"ef\0\0" + b"\xee" * 4 + bytes(8) + b"\xee" * 8
    assert stepped.server._scatter(b"x" * 16, pieces) == -1
    assert memory[data : data + 25] == b"xxxx\xee\xee\xee\xeexxxx\xee\xee\xee\xeexxxxxxxx\xee"
    assert stepped.server._scatter(b"y" * 17, pieces) == -1
    assert memory[data + 24] == 0xEE
    assert bytes(stepped.server._gather(pieces)) == b"y" * 16
    assert bytes(stepped.server._gather(pieces[:1])) == b"y" * 4
    assert bytes(stepped.server._gather(())) == b""


@pytest.mark.parametrize(
    ("blob", "last_error"),
    [
        (Short(DATA), "read of 4096 bytes at offset 4096: RuntimeError: read_at returned 4095 of 4096 bytes"),
        (Troubled(DATA, at=4096, error=SourceError("down")), "read of 4096 bytes at offset 4096: down"),
        (Troubled(DATA, at=4096, error=OSError(errno.EIO, "no")), "read of 4096 bytes at offset 4096: [Errno 5] no"),
    ],
    ids=["a bug", "a source", "a system call"],
)
def test_an_error_is_told_with_its_place_and_a_bug_with_its_class(
    stepped: Stepped, last_error: str, caplog: pytest.LogCaptureFixture
) -> None:
    for cdb in (read_10(8, 8), read_16(8, 8)):
        caplog.clear()
        number = stepped.do(cdb, room=4096)
        assert stepped.server.last_error == last_error
        ((answer, found),) = stepped.kernel.answers().items()
        assert (answer, found.status, found.sense) == (number, 2, (3, 0x1100))
        (record,) = caplog.records
        assert (record.message, record.levelname) == (f"one: {last_error}", "ERROR")
        assert (record.exc_info is not None) is ("RuntimeError" in last_error)
    assert (stepped.member.errors, stepped.member.reads) == (2, 0)


def test_a_probe_that_is_refused_is_no_error(stepped: Stepped, caplog: pytest.LogCaptureFixture) -> None:
    stepped.do(bytes((0x12, 1, 0xFE, 0, 96, 0)), room=96)
    assert (stepped.member.errors, stepped.server.last_error) == (0, "")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    stepped.server._fail(stepped.member, bytes((0x35, *bytes(9))), OSError(errno.EIO, "no"))
    assert stepped.member.errors == 1
    assert stepped.server.last_error == "SCSI command 35 00 00 00 00 00 00 00 00 00: [Errno 5] no"
    stepped.server._fail(stepped.member, write_10(1, 2), ScsiError(Sense.OUT_OF_RANGE, "past the end"))
    assert stepped.member.errors == 2
    assert stepped.server.last_error == "write of 1024 bytes at offset 512: past the end"


@pytest.mark.parametrize(
    ("cdb", "text"),
    [
        (b"", "SCSI command without a CDB"),
        (bytes(6), "SCSI command 00 00 00 00 00 00"),
        (read_16(2, 3), "read of 1536 bytes at offset 1024"),
        (bytes((0x0A, 0, 0, 2, 3, 0)), "write of 1536 bytes at offset 1024"),
    ],
)
def test_commands_in_messages(cdb: bytes, text: str) -> None:
    disk = ScsiDisk(MemoryBlob(DATA), serial="0", description="d")
    assert module._description(cdb, disk) == text


class Events:
    """The device's descriptor: its reads and writes fail as the test says."""

    def __init__(self, stepped: Stepped, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        self._event, self._code = stepped.kernel.event, code
        self._read, self._write = os.read, os.write
        monkeypatch.setattr(os, "read", lambda fd, size: self._fail(fd) or self._read(fd, size))
        monkeypatch.setattr(os, "write", lambda fd, data: self._fail(fd) or self._write(fd, data))
        monkeypatch.setattr(stepped.server, "_poll", SimpleNamespace(poll=list))

    def _fail(self, descriptor: int) -> None:
        if descriptor == self._event:
            raise OSError(self._code, os.strerror(self._code))


@pytest.mark.parametrize(
    ("code", "goes_on", "logged"),
    [
        (errno.EAGAIN, True, False),
        (errno.EIO, False, False),
        (errno.ENODEV, False, False),
        (errno.EINVAL, False, True),
    ],
    ids=os.strerror,
)
def test_waiting_for_commands(
    stepped: Stepped,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    goes_on: bool,
    logged: bool,
) -> None:
    Events(stepped, monkeypatch, code)
    assert stepped.server._receive() is goes_on
    assert ("one: waiting for commands: " in caplog.text) is logged


@pytest.mark.parametrize(
    ("code", "logged"), [(errno.EIO, False), (errno.ENODEV, False), (errno.EINVAL, True)], ids=os.strerror
)
def test_answers_are_in_the_ring_even_if_the_kernel_does_not_hear_of_them(
    stepped: Stepped, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int, logged: bool
) -> None:
    number = stepped.do(read_10(0, 8), room=4096)
    Events(stepped, monkeypatch, code)
    stepped.server._notify()
    assert ("one: telling the kernel of answers: " in caplog.text) is logged
    assert struct.unpack_from("=I", stepped.kernel.memory, TAIL_AT)[0] > 0
    assert stepped.kernel.answers().keys() == {number}
    assert stepped.pending() == 0


def test_the_kernel_hears_of_answers_before_the_server_sleeps(stepped: Stepped) -> None:
    stepped.do(read_10(0, 8), room=4096)
    stepped.kernel.put(read_10(0, 8), room=4096)
    stepped.kernel.publish()
    assert stepped.server._receive() is True
    assert (stepped.notices, len(stepped.server._taken)) == (1, 1)
    assert stepped.server._receive() is True
    assert stepped.notices == 1  # there was nothing to tell


def test_an_event_is_four_bytes_each_way(stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(os, "read", lambda fd, size: seen.append((fd, size)))
    monkeypatch.setattr(os, "write", lambda fd, data: seen.append((fd, data)))
    monkeypatch.setattr(stepped.server, "_poll", SimpleNamespace(poll=list))
    assert stepped.server._receive() is True
    stepped.server._notify()
    assert seen == [(stepped.kernel.event, 4), (stepped.kernel.event, bytes(4))]


def test_a_server_that_ends_answers_what_it_has_taken(stepped: Stepped) -> None:
    stepped.server.end()
    stepped.kernel.put(read_10(0, 8), room=4096)
    stepped.kernel.publish()
    assert stepped.server._receive() is True
    stepped.server._taken.clear()
    assert stepped.server._receive() is False


def test_a_member_that_waited_tells_the_kernel_of_its_answer(stepped: Stepped) -> None:
    number = stepped.kernel.put(read_10(0, 8), room=4096)
    later = stepped.kernel.put(read_10(0, 8), room=4096)
    stepped.kernel.publish()
    stepped.member.leading = False
    assert stepped.server._turn(stepped.member) is True
    assert stepped.kernel.answers().keys() == {number}
    assert later not in stepped.kernel.answers()
    assert (stepped.notices, len(stepped.server._taken)) == (1, 1)


def test_a_server_that_was_waited_for_has_closed_its_descriptor_once() -> None:
    kernel = KernelRing()
    server = TcmuServer(
        kernel.memory, kernel.event, ScsiDisk(MemoryBlob(DATA), serial="0", description="d"), name="one"
    )
    wake = server._wake
    assert not os.get_inheritable(wake)
    assert not os.get_blocking(wake)
    server.start()
    assert server.wait(0) is False
    server.end()
    assert server.wait(30) is True
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(wake)
    server.end()
    assert server.wait(30) is True
    kernel.close()


def test_a_ring_is_waited_for_in_steps(stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(pauses, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    stepped.kernel.put(read_10(0, 8), room=4096)
    stepped.kernel.publish()
    assert stepped.server.drained(0.5) is False
    assert sum(slept) == pytest.approx(0.5, abs=0.02)
    assert set(slept) == {0.01}


def test_commands_that_transfer_blocks() -> None:
    assert {0x08, 0x28, 0xA8, 0x88} == scsi.READS
    assert {0x0A, 0x2A, 0xAA, 0x8A} == scsi.WRITES
    assert {bytes((op,)) for op in (0x08, 0x28, 0xA8, 0x88, 0x0A, 0x2A, 0xAA, 0x8A)} == module._TRANSFERS
