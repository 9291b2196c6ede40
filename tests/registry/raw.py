"""A server that sends what it is given, HTTP or not: for answers that no HTTP library would write."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from obdlab.registry.reference import Repository

#: From a request's head (request line and headers) to the parts of its answer, sent as long as they are taken.
Answers = Callable[[str], Iterable[bytes]]


@dataclass
class RawServer:
    """What it listens on, and the heads of the requests that came."""

    port: int
    requests: list[str] = field(default_factory=list)
    sent: int = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def repository(self, name: str = "some/image") -> Repository:
        return Repository(self.host, name, plain_http=True)


@contextmanager
def raw_server(answers: Answers) -> Iterator[RawServer]:
    """Answer each request with ``answers(head)``; after the last part the connection is closed."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    server = RawServer(listener.getsockname()[1])
    connections: set[socket.socket] = set()
    threads: list[threading.Thread] = []

    def converse(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            head = b""
            while b"\r\n\r\n" not in head:
                part = connection.recv(1 << 16)
                if not part:
                    return
                head += part
            text = head.partition(b"\r\n\r\n")[0].decode("latin-1")
            server.requests.append(text)
            for part in answers(text):
                connection.sendall(part)
                server.sent += len(part)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.add(connection)
            threads.append(threading.Thread(target=converse, args=(connection,)))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
