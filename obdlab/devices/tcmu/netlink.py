"""Receives the kernel's events of added and removed TCMU devices: the generic netlink family TCM-USER.

Covers only the part of generic netlink (RFC 3549, ``linux/netlink.h``, ``linux/genetlink.h``) that one family needs.
pyroute2 would take a quarter of a second to import, in a process whose memory every device's server shares.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING

from obdlab.errors import DeviceError
from obdlab.system.attributes import write_attribute

if TYPE_CHECKING:
    from collections.abc import Iterator

FAMILY, GROUP = "TCM-USER", "config"
_VERSION = 2
_PARAMETERS = Path("/sys/module/target_core_user/parameters")

_NETLINK_GENERIC, _SOL_NETLINK = 16, 270
_NETLINK_ADD_MEMBERSHIP, _NETLINK_NO_ENOBUFS = 1, 5
_SO_RCVBUFFORCE = 33
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_NLMSG_ERROR = 2
_CONTROLLER, _GET_FAMILY = 0x10, 3
_FAMILY_ID, _FAMILY_NAME, _MULTICAST_GROUPS = 1, 2, 7
_GROUP_NAME, _GROUP_ID = 1, 2
_NLA_TYPE = 0x3FFF
_SET_FEATURES = 7
_RECEIVE_BUFFER = 4 << 20
_ANSWER_TIMEOUT_S = 5.0

#: struct nlmsghdr: len, type, flags, seq, pid; struct genlmsghdr: cmd, version, reserved
_MESSAGE = Struct("=IHHII")
_GENERIC = Struct("=BBH")
_ATTRIBUTE = Struct("=HH")
_U8, _U16, _U32, _I32 = Struct("=B"), Struct("=H"), Struct("=I"), Struct("=i")


class Attribute(IntEnum):
    """enum tcmu_genl_attr."""

    DEVICE = 1
    MINOR = 2
    COMMAND_STATUS = 7
    DEVICE_ID = 8
    KERNEL_WAITS = 9


class What(IntEnum):
    """enum tcmu_genl_cmd: the kind of an event. The reply's number is 3 more."""

    ADDED = 1
    REMOVED = 2
    RECONFIGURED = 3


@dataclass(frozen=True, slots=True)
class Event:
    """A device was added, removed or reconfigured. ``name`` is that of its UIO device."""

    what: What
    name: str
    number: int
    device_id: int | None


class TcmuNetlink:
    """Listens to the kernel's TCMU events. From construction on the kernel waits for :meth:`reply` to each of them.

    Raises DeviceError if the kernel has no TCMU, or does not let this process listen (CAP_NET_ADMIN).
    """

    def __init__(self) -> None:
        self._sequence = 0
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        except OSError as error:
            raise DeviceError(f"netlink: {error.strerror}") from error
        try:
            self._socket.bind((0, 0))
            # If an event were lost, the process that made the device would wait for good.
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
            self._socket.settimeout(_ANSWER_TIMEOUT_S)
            self._family, group = self._find_family()
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
            self._ask_to_wait()
            self._socket.setblocking(False)
        except OSError as error:
            self._socket.close()
            raise DeviceError(f"netlink family {FAMILY}: {error.strerror or error}") from error
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The socket's descriptor, for poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def events(self) -> list[Event]:
        """Return the events since the last call, without waiting. Malformed messages are left out."""
        found: list[Event] = []
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return found
            except InterruptedError:
                continue
            except OSError as error:
                raise DeviceError(f"netlink family {FAMILY}: {error.strerror}") from error
            found += parse_events(data, self._family)

    def reply(self, event: Event, status: int) -> None:
        """Send the kernel the outcome: 0, or a negative errno. A device that is gone meanwhile is fine."""
        if event.device_id is None:  # an old kernel, which waits for no reply
            return
        attributes = _attribute(Attribute.COMMAND_STATUS, _I32.pack(status))
        attributes += _attribute(Attribute.DEVICE_ID, _U32.pack(event.device_id))
        self._send(self._family, event.what + 3, _VERSION, attributes)

    def _find_family(self) -> tuple[int, int]:
        self._send(_CONTROLLER, _GET_FAMILY, 1, _attribute(_FAMILY_NAME, FAMILY.encode() + b"\0"))
        for kind, body in _messages(self._socket.recv(1 << 16)):
            if kind != _CONTROLLER:
                raise DeviceError(f"the kernel has no netlink family {FAMILY}: is target_core_user loaded?")
            values = dict(_attributes(body[_GENERIC.size :]))
            for _, nested in _attributes(values.get(_MULTICAST_GROUPS, b"")):
                group = dict(_attributes(nested))
                if group.get(_GROUP_NAME, b"").rstrip(b"\0") == GROUP.encode():
                    return _U16.unpack(values[_FAMILY_ID])[0], _U32.unpack(group[_GROUP_ID])[0]
        raise DeviceError(f"netlink family {FAMILY} has no group {GROUP}")

    def _ask_to_wait(self) -> None:
        self._send(self._family, _SET_FEATURES, _VERSION, _attribute(Attribute.KERNEL_WAITS, b"\1"), _NLM_F_ACK)
        for kind, body in _messages(self._socket.recv(1 << 16)):
            if kind == _NLMSG_ERROR:
                code = -_I32.unpack_from(body)[0]
                if code not in (0, errno.EOPNOTSUPP):
                    raise OSError(code, os.strerror(code))

    def _send(self, kind: int, command: int, version: int, attributes: bytes, flags: int = 0) -> None:
        self._sequence += 1
        body = _GENERIC.pack(command, version, 0) + attributes
        header = _MESSAGE.pack(_MESSAGE.size + len(body), kind, _NLM_F_REQUEST | flags, self._sequence, 0)
        self._socket.sendto(header + body, (0, 0))


def block() -> bool:
    """Have the kernel refuse new devices with EAGAIN while a handler starts, and drop the events that await a reply.

    Return False if the kernel cannot. :func:`unblock` ends it.
    """
    try:
        write_attribute(_PARAMETERS / "block_netlink", "1")
        write_attribute(_PARAMETERS / "reset_netlink", "1")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DeviceError(f"{_PARAMETERS}/block_netlink: {error.strerror}") from error
    return True


def unblock() -> None:
    """Undo :func:`block`."""
    try:
        write_attribute(_PARAMETERS / "block_netlink", "0")
    except FileNotFoundError:
        pass


def parse_events(data: bytes, family: int) -> list[Event]:
    """Return the events of the family in a received packet; other messages are left out."""
    return [event for kind, body in _messages(data) if kind == family and (event := _event(body))]


def _event(body: bytes) -> Event | None:
    if len(body) < _GENERIC.size:
        return None
    command, _, _ = _GENERIC.unpack_from(body)
    values = dict(_attributes(body[_GENERIC.size :]))
    name, number, device_id = (values.get(key) for key in (Attribute.DEVICE, Attribute.MINOR, Attribute.DEVICE_ID))
    if command not in tuple(What) or name is None or number is None or len(number) != 4:
        return None
    known = _U32.unpack(device_id)[0] if device_id is not None and len(device_id) == 4 else None
    return Event(What(command), name.rstrip(b"\0").decode(errors="replace"), _U32.unpack(number)[0], known)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _MESSAGE.size <= len(data):
        length, kind, *_ = _MESSAGE.unpack_from(data, at)
        if length < _MESSAGE.size or at + length > len(data):
            return
        yield kind, data[at + _MESSAGE.size : at + length]
        at += -(-length // 4) * 4


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            return
        yield kind & _NLA_TYPE, data[at + _ATTRIBUTE.size : at + length]
        at += -(-length // 4) * 4


def _attribute(kind: int, content: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(content), kind) + content + bytes(-len(content) % 4)
