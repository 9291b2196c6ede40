"""An NBD client that says whatever a test wants."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Self

from obdlab.contrib.nbd import protocol
from obdlab.contrib.nbd.protocol import Command, Option, Reply


def option(number: int, data: bytes = b"") -> bytes:
    return protocol.OPTION.pack(protocol.OPTION_MAGIC, number, len(data)) + data


def go(name: bytes = b"", number: int = Option.GO) -> bytes:
    return option(number, protocol.lengthed(name) + struct.pack(">HH", 1, protocol.Info.BLOCK_SIZE))


def meta(*queries: bytes, name: bytes = b"", number: int = Option.SET_META_CONTEXT) -> bytes:
    texts = b"".join(map(protocol.lengthed, queries))
    return option(number, protocol.lengthed(name) + struct.pack(">I", len(queries)) + texts)


def request(
    command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1, data: bytes = b""
) -> bytes:
    return protocol.REQUEST.pack(protocol.REQUEST_MAGIC, flags, command, cookie, offset, length) + data


class Speaker:
    """Connects and sends client flags; from then on a test says what is sent."""

    def __init__(
        self, place: Path | tuple[str, int], flags: int = protocol.FIXED_NEWSTYLE | protocol.NO_ZEROES
    ) -> None:
        self.sock = socket.socket(socket.AF_UNIX if isinstance(place, Path) else socket.AF_INET)
        self.sock.settimeout(60)
        self.sock.connect(str(place) if isinstance(place, Path) else place)
        try:
            greeting = self.take(protocol.GREETING.size)
        except BaseException:
            self.sock.close()
            raise
        magic, second, offered = protocol.GREETING.unpack(greeting)
        assert (magic, second, offered) == (
            protocol.MAGIC,
            protocol.OPTION_MAGIC,
            protocol.FIXED_NEWSTYLE | protocol.NO_ZEROES,
        )
        self.say(protocol.CLIENT_FLAGS.pack(flags))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def say(self, data: bytes) -> None:
        self.sock.sendall(data)

    def take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            got = self.sock.recv(length - len(data))
            if not got:
                raise EOFError(f"server hung up after {len(data)} of {length} bytes")
            data += got
        return data

    def answer(self) -> tuple[int, int, bytes]:
        """One answer to an option: which, type, data."""
        magic, number, kind, length = protocol.OPTION_REPLY.unpack(self.take(protocol.OPTION_REPLY.size))
        assert magic == protocol.OPTION_REPLY_MAGIC
        return number, kind, self.take(length)

    def ask(self, data: bytes) -> list[tuple[int, bytes]]:
        """Send an option; all its answers up to the acknowledgement or an error."""
        self.say(data)
        got = []
        while True:
            _, kind, content = self.answer()
            got.append((kind, content))
            if kind == Reply.ACK or kind >> 31:
                return got

    def begin(self, *, structured: bool = False) -> tuple[int, int]:
        """Agree on the export; its size and flags."""
        if structured:
            assert self.ask(option(Option.STRUCTURED_REPLY)) == [(Reply.ACK, b"")]
            assert self.ask(meta(protocol.ALLOCATION)) == [
                (Reply.META_CONTEXT, bytes(4) + protocol.ALLOCATION),
                (Reply.ACK, b""),
            ]
        infos = {struct.unpack(">H", data[:2])[0]: data for _, data in self.ask(go())[:-1]}
        assert protocol.INFO_BLOCK_SIZE.unpack(infos[protocol.Info.BLOCK_SIZE])[1:] == (
            1,
            4096,
            protocol.MAX_TRANSFER,
        )
        _, size, flags = protocol.INFO_EXPORT.unpack(infos[protocol.Info.EXPORT])
        return size, flags

    def simple(self, length: int = 0) -> tuple[int, int, bytes]:
        """One simple reply: cookie, errno and, unless it failed, ``length`` bytes."""
        magic, number, cookie = protocol.SIMPLE_REPLY.unpack(self.take(protocol.SIMPLE_REPLY.size))
        assert magic == protocol.SIMPLE_REPLY_MAGIC
        return cookie, number, b"" if number else self.take(length)

    def chunk(self) -> tuple[int, int, bytes]:
        """One structured reply of a single chunk: cookie, type, payload."""
        magic, flags, kind, cookie, length = protocol.CHUNK.unpack(self.take(protocol.CHUNK.size))
        assert (magic, flags) == (protocol.STRUCTURED_REPLY_MAGIC, protocol.CHUNK_DONE)
        return cookie, kind, self.take(length)

    def read(self, offset: int, length: int) -> bytes:
        self.say(request(Command.READ, offset, length))
        _, number, data = self.simple(length)
        assert number == 0
        return data

    def is_hung_up_on(self) -> bool:
        """Whether the server hangs up without another word."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True
