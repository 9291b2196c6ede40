"""A client's socket: exact reads and whole writes, each with a deadline, and the negotiation of an export."""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING

from obdlab.contrib.nbd import protocol
from obdlab.contrib.nbd.protocol import Option, Reply
from obdlab.errors import DeviceError, FormatError

if TYPE_CHECKING:
    from obdlab.contrib.nbd.export import NbdExport

_POLL_S = 1.0
_TIMEVAL = struct.Struct("ll")
_MAX_OPTIONS = 64


class ConnectionLostError(DeviceError, code="nbd-connection-lost"):
    """The client went away, took too long, or does not speak the protocol: no answer can reach it."""


class Connection:
    """One client. One thread reads. Writers serialise with their own lock."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # The kernel's own timeouts spare the poll(2) that Python's would cost before each call.
        interval = _TIMEVAL.pack(int(_POLL_S), 0)
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def receive(self, length: int, timeout_s: float, *, may_idle: bool = False) -> bytearray:
        """Return exactly ``length`` bytes. With ``may_idle`` the time limit starts at the first byte.

        Raises ConnectionLostError.
        """
        data = bytearray(length)
        view, have = memoryview(data), 0
        deadline = None if may_idle else time.monotonic() + timeout_s
        while have < length:
            try:
                got = self._sock.recv_into(view[have:])
            except BlockingIOError:
                got = -1
            except OSError as error:
                raise ConnectionLostError(f"client is gone: {error.strerror}") from error
            if got == 0:
                raise ConnectionLostError("client is gone")
            have += max(got, 0)
            if have == length:
                break
            if deadline is not None and time.monotonic() > deadline:
                raise ConnectionLostError(f"client sent {have} of {length} bytes in {timeout_s:g} s")
            if deadline is None and have:
                deadline = time.monotonic() + timeout_s
        return data

    def send(self, parts: list[bytes], timeout_s: float) -> None:
        """Send all of ``parts``. Raises ConnectionLostError."""
        left = sum(map(len, parts))
        deadline = time.monotonic() + timeout_s
        views: list[memoryview | bytes] = list(parts)
        while True:
            try:
                sent = self._sock.sendmsg(views, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise ConnectionLostError(f"client is gone: {error.strerror}") from error
            left -= sent
            if not left:
                return
            if time.monotonic() > deadline:
                raise ConnectionLostError(f"client did not take the last {left} bytes in {timeout_s:g} s")
            while sent >= len(views[0]):
                sent -= len(views.pop(0))
            views[0] = memoryview(views[0])[sent:]

    def hang_up(self, how: int = socket.SHUT_RDWR) -> None:
        """Wake all threads that wait for the client."""
        try:
            self._sock.shutdown(how)
        except OSError:  # gone already
            pass

    def close(self) -> None:
        """Close the socket. No thread may be using it."""
        self._sock.close()


class Negotiation:
    """Agrees with a client on the export and the replies' format, within ``timeout_s`` in all."""

    def __init__(self, connection: Connection, export: NbdExport, timeout_s: float) -> None:
        self._connection = connection
        self._export = export
        self._deadline = time.monotonic() + timeout_s
        self._no_zeroes = False
        #: The outcome.
        self.structured = False
        self.allocation = False

    def run(self) -> bool:
        """Return True once the client uses the export, False if it only made queries. Raises ConnectionLostError."""
        self._send(
            protocol.GREETING.pack(
                protocol.MAGIC, protocol.OPTION_MAGIC, protocol.FIXED_NEWSTYLE | protocol.NO_ZEROES
            )
        )
        (flags,) = protocol.CLIENT_FLAGS.unpack(self._receive(protocol.CLIENT_FLAGS.size))
        if flags & ~(protocol.FIXED_NEWSTYLE | protocol.NO_ZEROES) or not flags & protocol.FIXED_NEWSTYLE:
            raise ConnectionLostError(f"client speaks another negotiation (flags {flags:#x})")
        self._no_zeroes = bool(flags & protocol.NO_ZEROES)
        for _ in range(_MAX_OPTIONS):
            magic, option, length = protocol.OPTION.unpack(self._receive(protocol.OPTION.size))
            if magic != protocol.OPTION_MAGIC or length > protocol.MAX_TRANSFER:
                raise ConnectionLostError(f"no option (magic {magic:#x}, {length} bytes)")
            data = self._option_data(length)
            if option == Option.EXPORT_NAME:
                return self._by_name(data)
            if option == Option.ABORT:
                self._send(protocol.option_reply(option, Reply.ACK))
                return False
            try:
                answer, done = self._answer(option, data)
            except FormatError as error:
                answer, done = protocol.option_reply(option, Reply.INVALID, str(error).encode()), False
            self._send(answer)
            if done:
                return True
        raise ConnectionLostError(f"client asked more than {_MAX_OPTIONS} options")

    def _receive(self, length: int) -> bytes:
        return bytes(self._connection.receive(length, self._deadline - time.monotonic()))

    def _send(self, data: bytes) -> None:
        self._connection.send([data], self._deadline - time.monotonic())

    # Returns None for an option too long to read.
    def _option_data(self, length: int) -> bytes | None:
        if length <= protocol.MAX_OPTION:
            return self._receive(length)
        for at in range(0, length, protocol.MAX_OPTION):
            self._receive(min(protocol.MAX_OPTION, length - at))
        return None

    def _by_name(self, name: bytes | None) -> bool:
        if name is None or not self._export.is_called(name):
            raise ConnectionLostError(f"client asked for another export ({(name or b'')[:80]!r})")
        padding = b"" if self._no_zeroes else bytes(protocol.EXPORT_PADDING)
        self._send(protocol.EXPORT.pack(self._export.size, self._export.flags) + padding)
        return True

    def _answer(self, option: int, data: bytes | None) -> tuple[bytes, bool]:
        if data is None:
            return protocol.option_reply(option, Reply.TOO_BIG), False
        acknowledged = protocol.option_reply(option, Reply.ACK)
        if option == Option.LIST:
            if data:
                raise FormatError("option LIST has data")
            listed = protocol.option_reply(option, Reply.SERVER, protocol.lengthed(self._export.name.encode()))
            return listed + acknowledged, False
        if option == Option.STRUCTURED_REPLY:
            if data:
                raise FormatError("option STRUCTURED_REPLY has data")
            self.structured = True
            return acknowledged, False
        if option in (Option.INFO, Option.GO):
            if not self._export.is_called(protocol.parse_info(data)):
                return protocol.option_reply(option, Reply.UNKNOWN, b"no such export"), False
            return self._infos(option) + acknowledged, option == Option.GO
        if option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            return self._meta(option, data) + acknowledged, False
        return protocol.option_reply(option, Reply.UNSUPPORTED), False

    def _infos(self, option: int) -> bytes:
        export = self._export
        about = protocol.INFO_EXPORT.pack(protocol.Info.EXPORT, export.size, export.flags)
        sizes = protocol.INFO_BLOCK_SIZE.pack(protocol.Info.BLOCK_SIZE, 1, 4096, protocol.MAX_TRANSFER)
        return protocol.option_reply(option, Reply.INFO, about) + protocol.option_reply(option, Reply.INFO, sizes)

    def _meta(self, option: int, data: bytes) -> bytes:
        query, listing = protocol.parse_meta(data), option == Option.LIST_META_CONTEXT
        if not listing:
            self.allocation = False
            if not self.structured:
                raise FormatError("meta contexts need structured replies")
        if not self._export.is_called(query.export):
            raise FormatError("no such export", got=query.export[:80])
        if not self._export.knows_extents or not query.wants_allocation(listing=listing):
            return b""
        if not listing:
            self.allocation = True
        return protocol.option_reply(option, Reply.META_CONTEXT, bytes(4) + protocol.ALLOCATION)
