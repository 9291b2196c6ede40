"""Answers with damaged status lines and headers: the right bytes or a RegistryError, and soon."""

from __future__ import annotations

import random
import re
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.formats.oci import digest_of
from obdlab.registry.client import RegistryClient
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Repository

DATA = random.Random(3).randbytes(5000)
OFFSET, LENGTH = 100, 2000
WANTED = DATA[OFFSET : OFFSET + LENGTH]
HEAD = (
    f"HTTP/1.1 206 Partial Content\r\nContent-Type: application/octet-stream\r\n"
    f"Content-Range: bytes {OFFSET}-{OFFSET + LENGTH - 1}/{len(DATA)}\r\nContent-Length: {LENGTH}\r\n"
    f"Docker-Content-Digest: {digest_of(DATA)}\r\n\r\n"
).encode()


class OneAnswer:
    """Sends ``head`` and the wanted bytes to whoever connects, and hangs up."""

    def __init__(self) -> None:
        self.head = HEAD
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(65536)
                    connection.sendall(self.head + WANTED)
                except OSError:
                    pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[OneAnswer]:
    server = OneAnswer()
    yield server
    server.close()


def read(server: OneAnswer) -> bytes:
    client = RegistryClient(request_timeout_s=0.05, deadline_s=0.05)
    try:
        return client.read_range(Repository(server.host, "x", plain_http=True), digest_of(DATA), OFFSET, LENGTH)
    finally:
        client.close()


def test_the_undamaged_answer(server: OneAnswer) -> None:
    server.head = HEAD
    client = RegistryClient(deadline_s=20)
    repository = Repository(server.host, "x", plain_http=True)
    assert client.read_range(repository, digest_of(DATA), OFFSET, LENGTH) == WANTED
    client.close()


@settings(max_examples=150, deadline=None)
@given(
    position=st.integers(0, len(HEAD) - 1),
    removed=st.integers(0, 4),
    inserted=st.binary(max_size=4) | st.sampled_from([b"\r\n", b"\r\n\r\n", b"0", b"-", b"9" * 30, b": "]),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_headers(server: OneAnswer, position: int, removed: int, inserted: bytes) -> None:
    server.head = HEAD[:position] + inserted + HEAD[position + removed :]
    try:
        data = read(server)
    except RegistryError as error:
        assert f"{server.host}/x@{digest_of(DATA)}" in str(error)
        return
    # An early end of the headers makes the rest of them part of the body; nothing but their sums can tell then.
    # (Bare line feeds end lines as well.)
    end = re.search(rb"\n\r?\n", server.head)
    if end is None or end.end() == len(server.head):
        assert data == WANTED
