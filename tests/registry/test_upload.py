"""Uploads in chunks, of streams: against the real registry, and one whose connections break in the middle."""

from __future__ import annotations

import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from obdlab.formats.oci import digest_of
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Repository
from obdlab.registry.upload import BlobSink, _Section
from tests.registry.faulty import Server
from tests.registry.server import PASSWORD, USER, RegistryServer, running_registry

DATA = random.Random(7).randbytes(1_000_003)
CHUNK = 100_000


@dataclass
class Registry:
    """Takes uploads as the specification says. ``breaks`` holds after how many bytes the coming PATCHes break off."""

    port: int = 0
    uploads: dict[str, bytearray] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    breaks: list[int | None] = field(default_factory=list)
    lost_answers: int = 0
    #: What the coming PATCHes are answered in place of the upload's position.
    lies: list[str] = field(default_factory=list)
    forgets: bool = False
    least: int = 0

    @property
    def repository(self) -> Repository:
        return Repository(f"127.0.0.1:{self.port}", "some/image", plain_http=True)

    def count(self, method: str) -> int:
        return sum(1 for name, _ in self.requests if name == method)


@contextmanager
def registry_for_uploads() -> Iterator[Registry]:
    registry = Registry()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def reply(self, status: int, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": "0", **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()

        def note(self) -> str:
            registry.requests.append((self.command, self.headers.get("Content-Range")))
            return urlsplit(self.path).path

        def place(self, path: str) -> dict[str, str]:
            return {"Location": path + "?state=x", "Range": f"0-{max(len(registry.uploads[path]) - 1, 0)}"}

        def do_POST(self) -> None:
            path = self.note() + f"u{len(registry.requests)}"
            registry.uploads[path] = bytearray()
            least = {"OCI_Chunk_Min_Length": str(registry.least)} if registry.least else {}
            self.reply(202, Location=path, **least)

        def do_PATCH(self) -> None:
            path = self.note()
            length = int(self.headers["Content-Length"])
            if path not in registry.uploads:
                self.rfile.read(length)
                self.reply(404)
                return
            match = re.fullmatch(r"(\d+)-(\d+)", self.headers["Content-Range"])
            assert match is not None
            assert int(match[2]) + 1 - int(match[1]) == length
            if int(match[1]) != len(registry.uploads[path]):
                self.rfile.read(length)
                self.reply(416, **self.place(path))
                return
            stop = registry.breaks.pop(0) if registry.breaks else None
            registry.uploads[path] += self.rfile.read(length if stop is None else stop)
            if stop is None:
                self.reply(202, **self.place(path) | ({"Range": registry.lies.pop(0)} if registry.lies else {}))
                return
            if registry.forgets:
                del registry.uploads[path]
            self.close_connection = True

        def do_GET(self) -> None:
            path = self.note()
            if path in registry.uploads:
                self.reply(204, **self.place(path))
            else:
                self.reply(404)

        def do_PUT(self) -> None:
            path = self.note()
            data = bytes(registry.uploads.pop(path))
            digest = parse_qs(urlsplit(self.path).query)["digest"][0]
            assert digest == digest_of(data)
            registry.blobs[digest] = data
            if registry.lost_answers:
                registry.lost_answers -= 1
                self.close_connection = True
            else:
                self.reply(201)

        def do_HEAD(self) -> None:
            self.reply(200 if self.note().rpartition("/")[2] in registry.blobs else 404)

        def do_DELETE(self) -> None:
            registry.uploads.pop(self.note(), None)
            self.reply(204)

    server = Server(("127.0.0.1", 0), Handler)
    registry.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        server.hang_up()
        thread.join()
        server.server_close()


@pytest.fixture
def registry() -> Iterator[Registry]:
    with registry_for_uploads() as registry:
        yield registry


@pytest.fixture
def client() -> Iterator[RegistryClient]:
    with closing(RegistryClient(request_timeout_s=20, deadline_s=60)) as client:
        yield client


def sink_of(client: RegistryClient, repository: Repository, chunk: int = CHUNK) -> BlobSink:
    return BlobSink(client._session, repository, chunk=chunk)


def push(sink: BlobSink, data: bytes = DATA, piece: int = 30_000) -> tuple[str, int]:
    with sink:
        for begin in range(0, len(data), piece):
            assert sink.write(data[begin : begin + piece]) == len(data[begin : begin + piece])
        return sink.close()


@pytest.mark.registry
@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, len(DATA)])
@pytest.mark.parametrize("chunk", [CHUNK, 16 << 20])
def test_streams_reach_the_real_registry(
    size: int, chunk: int, client: RegistryClient, registry_server: RegistryServer
) -> None:
    repository = Repository(registry_server.host, f"tests/upload/{size}", plain_http=True)
    data = DATA[:size]
    sink = sink_of(client, repository, chunk)
    assert push(sink, data) == (digest_of(data), size)
    assert sink.close() == (digest_of(data), size)
    assert client.read_range(repository, digest_of(data), 0, size) == data
    assert client.blob_size(repository, digest_of(data)) == size


@pytest.mark.registry
def test_the_clients_sink(client: RegistryClient, registry_server: RegistryServer) -> None:
    repository = Repository(registry_server.host, "tests/upload/client", plain_http=True)
    with client.push_stream(repository) as sink:
        sink.write(memoryview(DATA))
    digest, size = sink.close()
    assert client.read_blob(repository, digest, size, size) == DATA


@pytest.mark.registry
@pytest.mark.parametrize("after", [60_000, 150_000, 520_000])
def test_the_real_registry_breaks_off(
    after: int, client: RegistryClient, registry_server: RegistryServer, caplog: pytest.LogCaptureFixture
) -> None:
    with _breaking_tunnel(registry_server.host, after) as (host, broken):
        repository = Repository(host, f"tests/upload/broken{after}", plain_http=True)
        assert push(sink_of(client, repository)) == (digest_of(DATA), len(DATA))
        assert broken.is_set()
        assert client.read_blob(repository, digest_of(DATA), len(DATA), len(DATA)) == DATA


@contextmanager
def _breaking_tunnel(host: str, after: int) -> Iterator[tuple[str, threading.Event]]:
    """Pass all on to ``host``, but reset the first connection that has sent ``after`` bytes."""
    address, _, port = host.rpartition(":")
    broken = threading.Event()
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, target: socket.socket, limit: int | None) -> None:
        count = 0
        with suppress(OSError):
            while chunk := source.recv(10_000):
                count += len(chunk)
                target.sendall(chunk)
                if limit is not None and count >= limit and not broken.is_set():
                    broken.set()
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def run(*arguments: Any) -> None:
        threads.append(threading.Thread(target=pump, args=arguments))
        threads[-1].start()

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.create_connection((address, int(port)))
                sockets.extend((near, far))
                run(near, far, after)
                run(far, near, None)

    server = socket.create_server(("127.0.0.1", 0))
    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}", broken
    finally:
        server.shutdown(socket.SHUT_RDWR)
        accepting.join()
        for end in sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for end in (server, *sockets):
            end.close()


def test_a_section_of_a_file_is_read_in_any_steps(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA[:1000])
    with (tmp_path / "file").open("rb") as file:
        for sizes in ((-1,), (None,), (500,), (100, -1), (0, None), (1, 2, 3, 1000), (299, 1, 1)):
            section = _Section(file, 200, 500)
            parts = [section.read(size) for size in sizes]  # type: ignore[arg-type] # as files may be read
            assert all(size is None or size < 0 or len(part) <= size for size, part in zip(sizes, parts, strict=True))
            assert b"".join(parts) == DATA[200 : 200 + sum(map(len, parts))]
            assert len(b"".join(parts)) == min(300, sum(300 if size is None or size < 0 else size for size in sizes))
        assert _Section(file, 200, 500).read() == DATA[200:500]
        assert file.tell() == 0  # the file's own position is another thread's


def test_a_broken_chunk_goes_on_where_it_broke(registry: Registry, client: RegistryClient) -> None:
    registry.breaks = [None, 40_000, None, 99_999, 0]
    assert push(sink_of(client, registry.repository)) == (digest_of(DATA), len(DATA))
    assert registry.blobs == {digest_of(DATA): DATA}
    assert registry.count("POST") == 1, "the upload was not begun anew"
    ranges = [text for method, text in registry.requests if method == "PATCH"]
    assert ranges[:4] == ["0-99999", "100000-199999", "140000-199999", "200000-299999"]


def test_a_forgotten_upload_begins_anew(registry: Registry, client: RegistryClient) -> None:
    registry.forgets = True
    registry.breaks = [None, None, 5]
    assert push(sink_of(client, registry.repository)) == (digest_of(DATA), len(DATA))
    assert registry.blobs == {digest_of(DATA): DATA}
    assert registry.count("POST") == 2


@pytest.mark.parametrize("position", ["0-0", "0-99999", "0-4000000"])
def test_an_upload_whose_position_is_wrong_begins_anew(
    registry: Registry, client: RegistryClient, position: str
) -> None:
    registry.lies = ["0-99999", position]
    assert push(sink_of(client, registry.repository)) == (digest_of(DATA), len(DATA))
    assert registry.blobs == {digest_of(DATA): DATA}
    assert registry.count("POST") == 2


def test_that_is_not_done_for_ever(registry: Registry, client: RegistryClient) -> None:
    registry.forgets = True
    registry.breaks = [5] * 100
    with pytest.raises(RegistryError, match="some/image"):
        push(sink_of(client, registry.repository))
    assert registry.count("POST") == 3
    assert registry.uploads == {}


def test_the_last_answer_may_be_lost(registry: Registry, client: RegistryClient) -> None:
    registry.lost_answers = 1
    assert push(sink_of(client, registry.repository)) == (digest_of(DATA), len(DATA))


def test_registries_may_want_larger_chunks(registry: Registry, client: RegistryClient) -> None:
    registry.least = 400_000
    push(sink_of(client, registry.repository))
    assert [text for method, text in registry.requests if method == "PATCH"] == [
        "0-399999",
        "400000-799999",
        "800000-1000002",
    ]


def test_giving_up_tells_the_registry(registry: Registry, client: RegistryClient) -> None:
    sink = sink_of(client, registry.repository)

    def interrupted() -> None:
        with sink:
            sink.write(DATA)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ValueError, match="closed upload"):
        sink.write(b"x")
    sink.abort()
    assert registry.uploads == {}
    assert registry.blobs == {}


def test_a_registry_that_is_away_fails_the_writer() -> None:
    with closing(RegistryClient(deadline_s=0.2)) as client:
        sink = sink_of(client, Repository("127.0.0.1:1", "x", plain_http=True))

        def write_on() -> None:
            while True:
                sink.write(b"x")
                time.sleep(0.01)

        with pytest.raises(RegistryError, match=r"127\.0\.0\.1:1/x"):
            write_on()
        sink.abort()


@pytest.mark.registry
def test_uploads_with_authentication(tmp_path: Path) -> None:
    with running_registry(tmp_path, htpasswd=True) as server:
        credentials = Credentials({server.host: (USER, PASSWORD)})
        repository = Repository(server.host, "tests/upload", plain_http=True)
        with closing(RegistryClient(credentials, deadline_s=60)) as client:
            assert push(sink_of(client, repository)) == (digest_of(DATA), len(DATA))
