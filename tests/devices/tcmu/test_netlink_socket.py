"""The netlink socket of a TCMU handler: what it sends, and what the kernel behind it answers."""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest

from obdlab.devices.tcmu import netlink
from obdlab.devices.tcmu.netlink import Event, TcmuNetlink, What
from obdlab.errors import DeviceError
from tests.devices.tcmu.speaking import NAME, attribute, event, message


class Netlink:
    """A netlink socket and the kernel behind it, with TCMU's family at number 42 and its group at 9."""

    def __init__(self, known: bool = True, refusal: int = 0) -> None:
        self.known, self.refusal = known, refusal
        self.options: list[tuple[int, int, int]] = []
        self.sent: list[bytes] = []
        self.answers: list[bytes | OSError] = []
        self.closed = False
        self.patience_s: float | None = None

    def __call__(self, family: int, kind: int, protocol: int) -> Netlink:
        assert (family, kind, protocol) == (16, socket.SOCK_RAW, 16)
        return self

    def bind(self, address: tuple[int, int]) -> None:
        assert address == (0, 0)

    def setsockopt(self, *option: int) -> None:
        self.options.append(option)  # type: ignore[arg-type]

    def settimeout(self, seconds: float) -> None:
        self.patience_s = seconds

    def setblocking(self, blocking: bool) -> None:
        self.patience_s = None if blocking else 0.0

    def fileno(self) -> int:
        return 123

    def close(self) -> None:
        self.closed = True

    def sendto(self, data: bytes, _: object) -> None:
        self.sent.append(data)
        length, kind, flags, sequence, port, command, _, reserved = struct.unpack_from("=IHHIIBBH", data)
        assert (length, port, reserved, sequence) == (len(data), 0, 0, len(self.sent))
        assert flags & 1  # a request
        if kind == 16:
            assert (command, data[20:]) == (3, attribute(2, b"TCM-USER\0"))
            groups = attribute(1, attribute(1, b"other\0") + attribute(2, struct.pack("=I", 5)))
            groups += attribute(2, attribute(1, b"config\0") + attribute(2, struct.pack("=I", 9)))
            found = attribute(1, struct.pack("=H", 42)) + attribute(2, b"TCM-USER\0") + attribute(7, groups)
            self.answers.append(message(1, found, family=16) if self.known else self._error(2))
        elif flags & 4:
            self.answers.append(self._error(self.refusal))

    def recv(self, room: int) -> bytes:
        self.waited_s = self.patience_s
        if not self.answers:
            raise BlockingIOError
        answer = self.answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        assert len(answer) <= room
        return answer

    @staticmethod
    def _error(code: int) -> bytes:
        return struct.pack("=IHHIIi", 20, 2, 0, 0, 0, -code)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Netlink:
    kernel = Netlink()
    monkeypatch.setattr(socket, "socket", kernel)
    return kernel


def test_a_handler_joins_the_group_and_has_the_kernel_wait(kernel: Netlink) -> None:
    TcmuNetlink()
    assert (270, 1, 9) in kernel.options  # SOL_NETLINK, NETLINK_ADD_MEMBERSHIP
    assert (270, 5, 1) in kernel.options  # NETLINK_NO_ENOBUFS
    assert (socket.SOL_SOCKET, 33, 4 << 20) in kernel.options  # SO_RCVBUFFORCE
    _, kind, flags, _, _, command, version, _ = struct.unpack_from("=IHHIIBBH", kernel.sent[-1])
    assert (kind, flags, command, version, kernel.sent[-1][20:]) == (42, 5, 7, 2, attribute(9, b"\1"))
    assert not kernel.closed
    assert [name for name, *_ in kernel.options] == [socket.SOL_SOCKET, 270, 270]


def test_only_the_first_answers_are_waited_for(kernel: Netlink) -> None:
    link = TcmuNetlink()
    assert kernel.waited_s is not None
    assert 1 <= kernel.waited_s <= 60
    assert kernel.patience_s == 0.0
    assert link.fileno() == 123
    link.close()
    assert kernel.closed


def test_a_family_without_the_group_is_an_error(kernel: Netlink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink, "GROUP", "confi")
    with pytest.raises(DeviceError, match="netlink family TCM-USER has no group confi"):
        TcmuNetlink()
    assert kernel.closed


def test_a_kernel_without_netlink_or_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(DeviceError, match="netlink: Protocol not supported"):
        TcmuNetlink()
    silent = Netlink()
    monkeypatch.setattr(silent, "recv", lambda _: (_ for _ in ()).throw(TimeoutError("timed out")))
    monkeypatch.setattr(socket, "socket", silent)
    with pytest.raises(DeviceError, match="netlink family TCM-USER: timed out"):
        TcmuNetlink()
    assert silent.closed


def test_events_are_answered_by_device(kernel: Netlink) -> None:
    link = TcmuNetlink()
    assert link.events() == []
    kernel.answers += [message(1, event(), family=42) + message(2, event(), family=42), InterruptedError()]
    kernel.answers += [message(3, event(), family=41), message(3, event(), family=42)]
    found = link.events()
    assert [each.what for each in found] == [What.ADDED, What.REMOVED, What.RECONFIGURED]
    for each, command in zip(found, (4, 5, 6), strict=True):
        link.reply(each, -17)
        sent = kernel.sent[-1]
        wanted = (len(sent), 42, 1, len(kernel.sent), 0, command, 2, 0)
        assert struct.unpack_from("=IHHIIBBH", sent) == wanted
        assert sent[20:] == attribute(7, struct.pack("=i", -17)) + attribute(8, struct.pack("=I", 77))
    kernel.answers.append(OSError(5, "Input/output error"))
    with pytest.raises(DeviceError, match="Input/output error"):
        link.events()


def test_an_old_kernel_waits_for_no_reply(kernel: Netlink) -> None:
    link = TcmuNetlink()
    before = len(kernel.sent)
    link.reply(Event(What.ADDED, NAME, 3, None), 0)
    assert len(kernel.sent) == before


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(Netlink(known=False), "is target_core_user loaded"), (Netlink(refusal=1), "Operation not permitted")],
)
def test_a_kernel_that_refuses(kernel: Netlink, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", kernel)
    with pytest.raises(DeviceError, match=reason):
        TcmuNetlink()
    assert kernel.closed
    monkeypatch.setattr(socket, "socket", Netlink(refusal=95))  # EOPNOTSUPP: a kernel that does not wait
    TcmuNetlink()
