"""Serves an NBD export to untrusted clients: bounded requests, deadlines, and one memory budget for all of them."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.call import UNBOUND
from obdlab.contrib.nbd import protocol
from obdlab.contrib.nbd.connection import Connection, ConnectionLostError, Negotiation
from obdlab.contrib.nbd.export import errno_of
from obdlab.contrib.nbd.protocol import Chunk, Command
from obdlab.devices.crew import Crew, Member
from obdlab.errors import DeviceError, ObdlabError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from obdlab.call import Call
    from obdlab.contrib.nbd.export import NbdExport

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0
#: Time for a request to arrive whole, and for the client to take an answer.
TRANSFER_S = 30.0
MAX_CONNECTIONS = 32
#: Requests under way on one connection.
_DEPTH = 32
_BUDGET = 256 << 20
_MAX_TEXT = 1024


class Budget:
    """Bytes that the requests under way may hold, over all connections."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._changed = threading.Condition()

    @contextmanager
    def take(self, count: int, timeout_s: float = TRANSFER_S) -> Iterator[None]:
        """Hold ``count`` bytes. Raises ConnectionLostError if they are not free in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._left >= count, timeout_s):
                raise ConnectionLostError(f"other requests hold all memory for {timeout_s:g} s")
            self._left -= count
        try:
            yield
        finally:
            with self._changed:
                self._left += count
                self._changed.notify_all()


class Client:
    """A connection from its negotiation to its end."""

    def __init__(self, connection: Connection, export: NbdExport, budget: Budget) -> None:
        self.connection = connection
        self._export = export
        self._budget = budget
        self._send_lock = threading.Lock()
        self._crew = Crew(self._turn, limit=_DEPTH, name="nbd")
        self._structured = False
        self._allocation = False

    def run(self) -> None:
        """Serve until the client is gone."""
        try:
            if self.negotiate():
                self._crew.start()
                self._crew.wait()
        except ConnectionLostError as error:
            log.info("nbd: %s", error)
        finally:
            self.connection.hang_up()
            self.connection.close()

    def negotiate(self) -> bool:
        """Return True if the client goes on to use the export. Raises ConnectionLostError."""
        negotiation = Negotiation(self.connection, self._export, HANDSHAKE_S)
        agreed = negotiation.run()
        self._structured, self._allocation = negotiation.structured, negotiation.allocation
        return agreed

    # A crew's turn: takes requests one after another. A request that waits for a registry gives the lead away.
    def _turn(self, member: Member) -> bool:
        try:
            while member.leading:
                if not self.next_request(member.call):
                    return False
        except ConnectionLostError as error:
            # No request comes any more. Those under way are still answered, and then run() hangs up.
            log.info("nbd: %s", error)
            return False
        return True

    def next_request(self, call: Call = UNBOUND) -> bool:
        """Take and answer one request. Return False after the client's last request. Raises ConnectionLostError."""
        head = self.connection.receive(protocol.REQUEST.size, TRANSFER_S, may_idle=True)
        magic, flags, command, cookie, offset, length = protocol.REQUEST.unpack(head)
        if magic != protocol.REQUEST_MAGIC:
            raise ConnectionLostError(f"no request (magic {magic:#x})")
        if command == Command.DISCONNECT:
            return False
        carries = length if command == Command.WRITE else 0
        if carries > protocol.MAX_TRANSFER:
            raise ConnectionLostError(f"WRITE of {length} bytes, of which at most {protocol.MAX_TRANSFER} are taken")
        held = carries or (min(length, protocol.MAX_TRANSFER) if command == Command.READ else 0)
        with self._budget.take(held):
            data = self.connection.receive(carries, TRANSFER_S)
            try:
                self._export.check(command, flags, offset, length)
                self._do(command, flags, cookie, offset, length, data, call)
            except ConnectionLostError:
                raise
            except Exception as error:
                if not isinstance(error, ObdlabError | OSError | MemoryError):
                    log.exception("nbd: command %d at %d, %d bytes", command, offset, length)
                self._fail(command, cookie, error)
        return True

    def _do(
        self, command: int, flags: int, cookie: int, offset: int, length: int, data: bytearray, call: Call
    ) -> None:
        if command == Command.READ:
            content = self._export.read(offset, length, call)
            if self._structured:
                self._chunk(cookie, Chunk.OFFSET_DATA, protocol.OFFSET.pack(offset), content)
            else:
                self._send([protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, 0, cookie), content])
        elif command == Command.BLOCK_STATUS:
            if not self._allocation:
                raise OSError(errno.EINVAL, "base:allocation was not agreed on")
            self._chunk(cookie, Chunk.BLOCK_STATUS, bytes(4) + self._export.block_status(flags, offset, length))
        else:
            self._export.change(command, flags, offset, length, data, call)
            self._send([protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, 0, cookie)])

    def _fail(self, command: int, cookie: int, error: Exception) -> None:
        number, text = errno_of(error)
        log.warning("nbd: command %d failed: %s", command, text)
        if self._structured and command in (Command.READ, Command.BLOCK_STATUS):
            said = text.encode()[:_MAX_TEXT]
            self._chunk(cookie, Chunk.ERROR, protocol.ERROR.pack(number, len(said)) + said)
        else:
            self._send([protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, number, cookie)])

    def _chunk(self, cookie: int, kind: Chunk, head: bytes, content: bytes = b"") -> None:
        length = len(head) + len(content)
        packed = protocol.CHUNK.pack(protocol.STRUCTURED_REPLY_MAGIC, protocol.CHUNK_DONE, kind, cookie, length)
        self._send([packed + head, content] if content else [packed + head])

    def _send(self, parts: list[bytes]) -> None:
        with self._send_lock:
            try:
                self.connection.send(parts, TRANSFER_S)
            except ConnectionLostError:
                # Under the lock: the client would take the next answer for the rest of this one.
                self.connection.hang_up()
                raise


class NbdServer:
    """Listens from construction on, at a unix socket's path or an address and port (0: any free port).

    Raises DeviceError if it cannot listen there.
    """

    def __init__(self, export: NbdExport, place: Path | tuple[str, int]) -> None:
        self._export = export
        self._budget = Budget(_BUDGET)
        self._lock = threading.Lock()
        self._clients: dict[Client, threading.Thread] = {}
        self._ending = False
        self._path = None if isinstance(place, tuple) else place
        try:
            self._listener = _listen(place)
        except OSError as error:
            where = f"{place[0]}:{place[1]}" if isinstance(place, tuple) else str(place)
            raise DeviceError(f"nbd: cannot listen on {where}: {error.strerror or error}") from error
        self._thread = threading.Thread(target=self._accept, name="nbd-accept", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens at, unless it listens at a path."""
        return int(self._listener.getsockname()[1])

    @property
    def connections(self) -> int:
        """The number of connected clients."""
        return len(self._clients)

    def start(self) -> None:
        """Begin to serve, in threads."""
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._ending:
                    return
                log.warning("nbd: accept: %s", error.strerror)
                time.sleep(0.1)  # such as out of descriptors
                continue
            with self._lock:
                if self._ending or len(self._clients) >= MAX_CONNECTIONS:
                    log.warning("nbd: refused a client: there are %d", len(self._clients))
                    sock.close()
                    continue
                client = Client(Connection(sock), self._export, self._budget)
                thread = threading.Thread(target=self._serve, args=(client,), name="nbd-client", daemon=True)
                self._clients[client] = thread
            try:
                thread.start()
            except RuntimeError as error:  # no more threads, for now
                log.warning("nbd: refused a client: %s", error)
                with self._lock:
                    del self._clients[client]
                client.connection.close()

    def _serve(self, client: Client) -> None:
        try:
            client.run()
        finally:
            with self._lock:
                self._clients.pop(client, None)

    def stop(self, grace_s: float = 10.0) -> bool:
        """Take no more requests and answer those under way. Return True if all were answered within ``grace_s``."""
        self._ending = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(grace_s)
        self._listener.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        with self._lock:
            under_way = dict(self._clients)
        for client in under_way:
            client.connection.hang_up(socket.SHUT_RD)
        deadline = time.monotonic() + grace_s
        for thread in under_way.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        for client in under_way:
            client.connection.hang_up()
        return not any(thread.is_alive() for thread in under_way.values())


def _listen(place: Path | tuple[str, int]) -> socket.socket:
    if isinstance(place, tuple):
        family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        return socket.create_server(place, family=family, backlog=16)
    sock = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(sock.fileno(), 0o600)  # Linux gives the path the socket's mode
        _clear(place)
        sock.bind(str(place))
        sock.listen(16)
    except BaseException:
        sock.close()
        raise
    return sock


# A socket without a listener was left by a killed server.
def _clear(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "there is a file that is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except TimeoutError:
            pass
    raise OSError(errno.EADDRINUSE, "another server listens there")
