"""The kernel's side of a FUSE connection, over a pair of sockets: requests as packets, answers as packets."""

from __future__ import annotations

import select
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from obdlab.devices.fuse import FuseServer
from obdlab.system import abi
from obdlab.system.abi import FuseOpcode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.blob import Blob

_PATIENCE_S = 30.0


def request(opcode: int, body: bytes = b"", *, unique: int = 1, node: int = abi.FUSE_ROOT_ID) -> bytes:
    """Return a request as the kernel lays it out."""
    header = abi.FUSE_IN_HEADER
    return header.pack(header.size + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body


def write_body(offset: int, data: bytes) -> bytes:
    """Return the body of a WRITE."""
    return abi.FUSE_TRANSFER_IN.pack(0, offset, len(data), 0, 0, 0, 0) + data


class Connection:
    """A connection whose ``server`` descriptor a FuseServer joins; its :meth:`wait` closes that descriptor."""

    def __init__(self) -> None:
        self._kernel, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._kernel.settimeout(_PATIENCE_S)
        self.server = server.detach()
        self._unique = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the file system: the server's next read fails."""
        # A socket closed with an answer unread resets its peer, which would read nothing for ever otherwise.
        self._kernel.send(request(FuseOpcode.STATFS))
        answered = select.select([self._kernel], [], [], _PATIENCE_S)[0]
        self._kernel.close()
        assert answered, "no answer in time"

    def do(self, opcode: int, body: bytes = b"") -> tuple[int, bytes]:
        """Have one request answered; return the answer's errno and its bytes."""
        wanted = self.ask(opcode, body)
        unique, code, answer = self.answer()
        assert unique == wanted
        return code, answer

    def ask(self, opcode: int, body: bytes = b"") -> int:
        """Send one request; return its number, by which :meth:`answer` names it."""
        self._unique += 1
        self._kernel.send(request(opcode, body, unique=self._unique))
        return self._unique

    def answer(self) -> tuple[int, int, bytes]:
        """Return the next answer: its request's number, its errno and its bytes."""
        answer = self._kernel.recv(1 << 21)
        length, code, unique = abi.FUSE_OUT_HEADER.unpack_from(answer)
        assert length == len(answer)
        return unique, -code, answer[abi.FUSE_OUT_HEADER.size :]

    def send(self, opcode: int, body: bytes = b"") -> None:
        """Send a request that gets no answer."""
        self._kernel.send(request(opcode, body))

    def notice(self) -> bytes:
        """Return the next packet that answers no request."""
        return self._kernel.recv(1 << 12)

    def read(self, offset: int, size: int) -> tuple[int, bytes]:
        """Have a READ answered."""
        return self.do(FuseOpcode.READ, abi.FUSE_TRANSFER_IN.pack(0, offset, size, 0, 0, 0, 0))

    def write(self, offset: int, data: bytes) -> tuple[int, bytes]:
        """Have a WRITE answered."""
        return self.do(FuseOpcode.WRITE, write_body(offset, data))


@contextmanager
def joined(blob: Blob) -> Iterator[tuple[Connection, FuseServer]]:
    """Serve a blob over a simulated connection."""
    with Connection() as connection:
        server = FuseServer(blob, name="simulated")
        server.join(connection.server)
        yield connection, server
    assert server.wait(30)
