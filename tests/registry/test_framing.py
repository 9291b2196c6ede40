"""Answers whose framing lies: every read from the network holds a bounded number of bytes, and fails in time."""

from __future__ import annotations

import io
import itertools
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from obdlab.errors import ObdlabError
from obdlab.formats.oci import OCI_INDEX, OCI_MANIFEST, digest_of
from obdlab.registry import tries
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import CredentialsService
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Reference
from obdlab.registry.transport import Transport
from tests.registry.raw import RawServer, raw_server

MiB = 1 << 20
# Far more than any of the limits, so that a reader without one is caught, and yet soon over.
ENDLESS = 256 * MiB
# A manifest of 4 MiB is read in one piece, which doubles while it grows.
MOST_HELD = 16 * MiB
DIGEST = digest_of(b"nothing that is sent")
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
_PART = bytes(MiB)


def endless(first: bytes, part: bytes = _PART) -> Iterator[bytes]:
    yield first
    yield from itertools.repeat(part, ENDLESS // len(part))


BODIES: dict[str, Callable[[], Iterable[bytes]]] = {
    "chunk of -1": lambda: endless(CHUNKED + b"-1\r\n"),
    "chunk of -5": lambda: endless(CHUNKED + b"-5\r\n"),
    "chunk of -1 after a good one": lambda: endless(CHUNKED + b"1\r\n{\r\n-1\r\n"),
    "chunk of 2^62": lambda: endless(CHUNKED + b"4000000000000000\r\n"),
    "chunks of one byte": lambda: endless(CHUNKED, b"1\r\nx\r\n" * 50_000),
    "chunks with long extensions": lambda: endless(CHUNKED, b"1;" + b"e" * 60_000 + b"\r\nx\r\n"),
    "trailers without end": lambda: endless(CHUNKED + b"0\r\n", b"X-Trailer: x\r\n" * 10_000),
    "headers without end": lambda: endless(b"X-First: 1\r\n", b"X-Header: " + b"h" * 60_000 + b"\r\n"),
    "one header without end": lambda: endless(b"X-First: ", b"h" * MiB),
    "no length": lambda: endless(b"\r\n"),
    "length of 2^62": lambda: endless(b"Content-Length: 4611686018427387904\r\n\r\n"),
    "length of -1": lambda: endless(b"Content-Length: -1\r\n\r\n"),
    "length with a sign": lambda: endless(b"Content-Length: +100\r\n\r\n"),
    "two lengths": lambda: endless(b"Content-Length: 100\r\nContent-Length: 200\r\n\r\n"),
    "a length of 60,000 digits": lambda: endless(b"Content-Length: " + b"9" * 60_000 + b"\r\n\r\n"),
    "unknown transfer encoding": lambda: endless(b"Transfer-Encoding: gzip, chunked\r\n\r\n"),
}
STATUSES = {
    "good": b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-99999/100000\r\n",
    "whole": b"HTTP/1.1 200 OK\r\nContent-Type: " + OCI_INDEX.encode() + b"\r\n",
    "error": b"HTTP/1.1 503 Unavailable\r\n",
    "refused": b"HTTP/1.1 404 Not Found\r\n",
    "redirect": b"HTTP/1.1 307 Elsewhere\r\nLocation: /elsewhere\r\n",
    "accepted": b"HTTP/1.1 202 Accepted\r\nLocation: /upload\r\n",
    "challenge": b'HTTP/1.1 401 Who?\r\nWWW-Authenticate: Basic realm="x"\r\n',
}


def stream(client: RegistryClient, server: RawServer) -> None:
    with client.open_range(server.repository(), DIGEST, 0, 100_000) as opened:
        opened.read(100_000)


def push(client: RegistryClient, server: RawServer) -> None:
    with client.push_stream(server.repository()) as sink:
        sink.write(b"x")


OPERATIONS: dict[str, Callable[[RegistryClient, RawServer], object]] = {
    "range": lambda client, server: client.read_range(server.repository(), DIGEST, 0, 100_000),
    "stream of a range": stream,
    "blob": lambda client, server: client.read_blob(server.repository(), DIGEST, 3 * MiB, 3 * MiB),
    "size": lambda client, server: client.blob_size(server.repository(), DIGEST),
    "manifest": lambda client, server: client.get_manifest(Reference(server.host, "some/image", "x", None)),
    "referrers": lambda client, server: client.referrers(server.repository(), DIGEST),
    "head": lambda client, server: client.has_blob(server.repository(), DIGEST),
    "upload": lambda client, server: client.push_blob(server.repository(), DIGEST, 1, lambda: io.BytesIO(b"x")),
    "upload in chunks": push,
}


def peak_of(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        try:
            call()
        except ObdlabError:
            pass  # anything else is a defect
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


# Each operation with the answer that it wants, and errors, redirects and challenges, which are read by one function.
CASES = [
    ("range", "good"),
    ("range", "whole"),
    ("range", "error"),
    ("range", "refused"),
    ("range", "redirect"),
    ("range", "challenge"),
    ("stream of a range", "good"),
    ("blob", "whole"),
    ("size", "good"),
    ("manifest", "whole"),
    ("referrers", "whole"),
    ("head", "error"),
    ("upload", "challenge"),
    ("upload in chunks", "accepted"),
]


@pytest.mark.parametrize("body", BODIES)
def test_no_answer_is_held_without_bound(body: str) -> None:
    def run(case: tuple[str, str]) -> None:
        operation, status = case
        with raw_server(lambda _: itertools.chain([STATUSES[status]], BODIES[body]())) as server:
            end = time.monotonic() + 60
            while not server.requests:  # a busy machine may not even connect within the deadline
                assert time.monotonic() < end, "nothing was asked"
                client = RegistryClient(request_timeout_s=1, deadline_s=1, hedge_share=0)
                try:
                    OPERATIONS[operation](client, server)
                except ObdlabError:
                    pass  # anything else is a defect
                finally:
                    client.close()

    def run_all() -> None:
        with ThreadPoolExecutor(len(CASES)) as threads:
            list(threads.map(run, CASES))

    began = time.monotonic()
    assert peak_of(run_all) < len(CASES) * MOST_HELD // 2
    assert time.monotonic() - began < 120


@pytest.mark.parametrize("body", BODIES)
def test_no_token_answer_is_held_without_bound(body: str) -> None:
    def answers(head: str) -> Iterable[bytes]:
        if head.startswith("GET /token"):
            return itertools.chain([b"HTTP/1.1 200 OK\r\n"], BODIES[body]())
        challenge = f'Bearer realm="http://{server.host}/token"'
        return [f"HTTP/1.1 401 Who?\r\nWWW-Authenticate: {challenge}\r\nContent-Length: 0\r\n\r\n".encode()]

    with raw_server(answers) as server:
        client = RegistryClient(request_timeout_s=2, deadline_s=2)
        assert peak_of(lambda: client.read_range(server.repository(), DIGEST, 0, 100)) < MOST_HELD
        client.close()
        assert any(head.startswith("GET /token") for head in server.requests)


@pytest.mark.parametrize("body", BODIES)
def test_no_answer_of_a_credentials_service_is_held_without_bound(body: str) -> None:
    with raw_server(lambda _: itertools.chain([b"HTTP/1.1 200 OK\r\n"], BODIES[body]())) as server:
        transport = Transport(silence_s=2, user_agent="tests")
        service = CredentialsService(f"http://{server.host}/", transport, timeout_s=2)
        peak = peak_of(lambda: service.look_up(server.repository(), "https://host/v2/x/blobs"))
        transport.close()
        assert server.requests
        assert peak < MOST_HELD


def test_interim_answers_without_end() -> None:
    for interim in (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\nX: " + b"y" * 60_000 + b"\r\n\r\n"):
        with raw_server(lambda _, interim=interim: itertools.repeat(interim * (MiB // len(interim)))) as server:  # type: ignore[misc]
            client = RegistryClient(request_timeout_s=5, deadline_s=5)
            assert peak_of(lambda: OPERATIONS["range"](client, server)) < MOST_HELD  # noqa: B023
            client.close()
            assert server.sent < ENDLESS


def test_an_interim_answer_is_not_taken_for_that_of_the_next_request() -> None:
    data = bytes(range(100))

    # 103 is skipped by no part of http.client: what follows would be the answer to the connection's next request.
    def answers(head: str) -> Iterable[bytes]:
        yield b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        yield b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-99/100\r\nContent-Length: 100\r\n\r\n" + data

    with raw_server(answers) as server:
        client = RegistryClient(request_timeout_s=2, deadline_s=2)
        with pytest.raises(RegistryError, match="interim answer"):
            client.read_range(server.repository(), DIGEST, 0, 100)
        client.close()
    assert len(server.requests) > 1  # each over a connection of its own


@pytest.mark.parametrize("body", ["chunk of -1", "chunk of -5", "unknown transfer encoding", "length with a sign"])
def test_framing_that_passes_is_tried_again(body: str) -> None:
    data = bytes(range(100))
    status = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-99/100\r\n"

    def answers(head: str) -> Iterable[bytes]:
        if len(server.requests) < 3:
            return itertools.chain([status], BODIES[body]())
        return [status + b"Content-Length: 100\r\n\r\n" + data]

    with raw_server(answers) as server:
        client = RegistryClient(request_timeout_s=10, deadline_s=60)
        assert client.read_range(server.repository(), DIGEST, 0, 100) == data
        client.close()
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [b"206 Partial\r\nContent-Range: bytes 0-99999/100000", b"200 OK"])
def test_a_compressed_answer_is_no_range(status: bytes) -> None:
    bomb = zlib.compress(bytes(64 * MiB), 9, 31)
    bomb += bytes(100_000 - len(bomb))
    head = b"HTTP/1.1 " + status + b"\r\nContent-Encoding: gzip\r\nContent-Length: 100000\r\n\r\n"
    with raw_server(lambda _: [head + bomb]) as server:
        client = RegistryClient(request_timeout_s=10, deadline_s=10)
        with pytest.raises(RegistryError, match="another encoding"):
            client.read_range(server.repository(), DIGEST, 0, 100_000)
        client.close()


def test_a_compressed_manifest_is_not_unpacked() -> None:
    bomb = zlib.compress(bytes(64 * MiB), 9, 31)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {OCI_MANIFEST}\r\nContent-Encoding: gzip\r\n\r\n".encode()
    with raw_server(lambda _: [head + bomb]) as server:
        client = RegistryClient(request_timeout_s=10, deadline_s=10)
        reference = Reference(server.host, "some/image", None, DIGEST)
        assert peak_of(lambda: client.get_manifest(reference)) < MOST_HELD
        client.close()


def test_a_body_that_drips_ends_at_the_deadline() -> None:
    def answers(head: str) -> Iterable[bytes]:
        yield STATUSES["whole"] + CHUNKED
        while True:
            time.sleep(0.05)
            yield b"1\r\n{\r\n"

    with raw_server(answers) as server:
        for name in ("range", "manifest", "referrers", "blob"):
            client = RegistryClient(request_timeout_s=5, deadline_s=1)
            began = time.monotonic()
            with pytest.raises(RegistryError):
                OPERATIONS[name](client, server)
            client.close()
            assert time.monotonic() - began < 30, name


@pytest.fixture
def one_try_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no time for a second try, and much for the first: the machine may be busy."""
    monkeypatch.setattr(tries, "_FIRST_PAUSE_S", 1000.0)


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Range: bytes 0-99/100\r\nContent-Range: bytes 5-104/200\r\n",
        b"Content-Range: bytes 0-99/100, bytes 0-99/100\r\n",
        b"Content-Range: bytes 0-99/0\r\n",
        b"Content-Range: bytes 0-99/99\r\n",
        b"Content-Range: bytes 00000000000000000000-99/100\r\n",
        b"Content-Range: bytes +0-99/100\r\n",
        b"Content-Range: bytes 0-9_9/100\r\n",
        b"Content-Range: bytes 1-100/101\r\n",
        b"Content-Range: bytes 99-0/100\r\n",
        b"Content-Range: items 0-99/100\r\n",
        b"Content-Type: multipart/byteranges; boundary=x\r\n",
        b"",
    ],
)
@pytest.mark.usefixtures("one_try_only")
def test_a_range_that_is_not_plainly_the_wanted_one_is_refused(headers: bytes) -> None:
    answer = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 100\r\n" + headers + b"\r\n" + bytes(100)
    with raw_server(lambda _: [answer]) as server:
        client = RegistryClient(request_timeout_s=30, deadline_s=60, hedge_share=0)
        with pytest.raises(RegistryError, match=r"wrong range|smaller"):
            client.read_range(server.repository(), DIGEST, 0, 100)
        client.close()


@pytest.mark.usefixtures("one_try_only")
@pytest.mark.parametrize("sent", [0, 1, 99])
def test_a_body_without_a_length_that_ends_early_is_refused(sent: int) -> None:
    answer = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-99/100\r\n\r\n" + bytes(sent)
    with raw_server(lambda _: [answer]) as server:
        client = RegistryClient(request_timeout_s=30, deadline_s=60, hedge_share=0)
        with pytest.raises(RegistryError, match=rf"broke off {100 - sent} bytes before its end"):
            client.read_range(server.repository(), DIGEST, 0, 100)
        client.close()


def test_a_stream_is_whole_with_its_last_byte() -> None:
    data = b"all of it"
    head = b"HTTP/1.1 200 OK\r\n" + CHUNKED
    with raw_server(lambda _: [head + b"9\r\n" + data + b"\r\n"]) as server:  # and the end of chunks is missing
        client = RegistryClient(request_timeout_s=20, deadline_s=20, hedge_share=0)
        with client.stream_blob(server.repository(), digest_of(data), len(data)) as stream:
            assert stream.read() == data
        client.close()
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "digest",
    [
        "sha512:" + "0" * 128,
        DIGEST.upper(),
        DIGEST.replace("sha256", "SHA256"),
        DIGEST + "0",
        DIGEST[:-1] + "\n",
        "md5:x",
    ],
)
def test_digests_of_other_forms_are_asked_for_nowhere(digest: str) -> None:
    with raw_server(lambda _: [STATUSES["whole"] + b"Content-Length: 0\r\n\r\n"]) as server:
        client = RegistryClient(request_timeout_s=5, deadline_s=5)
        with pytest.raises(ObdlabError):
            client.read_range(server.repository(), digest, 0, 100)
        with pytest.raises(ObdlabError):
            client.read_blob(server.repository(), digest, 10, 10)
        client.close()
        assert not server.requests
