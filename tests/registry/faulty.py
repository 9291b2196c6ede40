"""A small registry that misbehaves on command: the outage laboratory of the tests.

Blobs and manifests are served as a good registry would, until a fault is put before an answer:
``registry.next(fault, ...)`` for the coming requests for blobs, ``registry.always(fault)`` for all of them.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from obdlab.formats.oci import OCI_MANIFEST, digest_of
from obdlab.registry.reference import Repository


@dataclass
class Request:
    """What was asked, as tests like to see it."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str


@dataclass
class Answer:
    """The good answer about to be given; a fault changes it or writes one of its own."""

    handler: Answering
    status: int
    headers: dict[str, str]
    body: bytes
    whole: bytes = b""

    def send(self) -> None:
        self.handler.answer(self.status, self.headers, self.body)


Fault = Callable[[Answer], None]


@dataclass
class FaultyRegistry:
    """State shared by all requests. ``auth`` is "", "basic" or "bearer"."""

    auth: str = ""
    user: str = "user"
    password: str = "pass:word"
    token_life_s: float = 300.0
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    tokens_issued: int = 0
    token_fault: Fault | None = None
    realm: str = ""
    port: int = 0
    closing: threading.Event = field(default_factory=threading.Event)
    _next: deque[Fault | None] = field(default_factory=deque)
    _always: Fault | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def repository(self, name: str = "some/image") -> Repository:
        return Repository(self.host, name, plain_http=True)

    def add_blob(self, data: bytes) -> str:
        digest = digest_of(data)
        self.blobs[digest] = data
        return digest

    def add_manifest(self, tag: str, data: bytes, media_type: str = OCI_MANIFEST) -> str:
        self.manifests[tag] = self.manifests[digest_of(data)] = (media_type, data)
        return digest_of(data)

    def next(self, *faults: Fault | None) -> None:
        """Queue faults for the coming blob and manifest requests, one each; None is a good answer."""
        self._next.extend(faults)

    def always(self, fault: Fault | None) -> None:
        """Put a fault before every blob and manifest request that has none queued."""
        self._always = fault

    def revoke_tokens(self) -> None:
        self.tokens.clear()

    def fault(self) -> Fault | None:
        try:
            return self._next.popleft()
        except IndexError:
            return self._always

    def blob_requests(self) -> list[Request]:
        return [request for request in self.requests if "/blobs/" in request.path or "/storage/" in request.path]


@contextmanager
def faulty_registry(**options: object) -> Iterator[FaultyRegistry]:
    """Run one on a free loopback port."""
    registry = FaultyRegistry(**options)  # type: ignore[arg-type]
    server = Server(("127.0.0.1", 0), Handler)
    server.registry = registry
    registry.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield registry
    finally:
        registry.closing.set()
        server.shutdown()
        server.hang_up()
        thread.join()
        server.server_close()


class Server(ThreadingHTTPServer):
    """A server whose connections can be cut, and whose threads are waited for."""

    daemon_threads = False
    request_queue_size = 128
    registry: FaultyRegistry

    def __init__(self, *args: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().close_request(request)

    def hang_up(self) -> None:
        for connection in tuple(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients break off: that is what is tested


class Answering(BaseHTTPRequestHandler):
    """What a fault needs of the connection that it spoils."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def closing(self) -> threading.Event:
        """Set when the server ends: whoever is silent on purpose stops then."""
        raise NotImplementedError

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.start(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


class Handler(Answering):
    server: Server

    @property
    def registry(self) -> FaultyRegistry:
        return self.server.registry

    @property
    def closing(self) -> threading.Event:
        return self.registry.closing

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - http.server looks for these names

    def _handle(self) -> None:
        registry = self.registry
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        registry.requests.append(
            Request(
                self.command,
                self.path,
                self.headers.get("Range"),
                self.headers.get("Authorization"),
                self.headers.get("Host", ""),
            )
        )
        path = urlsplit(self.path).path
        if path == "/token":
            self._token()
        elif path.startswith("/storage/"):
            self._object("/storage/", registry.blobs.get(path.rpartition("/")[2]))
        elif not self._authorized():
            self.refuse()
        elif "/blobs/uploads/" in path:
            self._upload(body)
        elif "/blobs/" in path:
            self._object("/blobs/", registry.blobs.get(path.rpartition("/")[2]))
        elif self.command == "PUT":
            digest = registry.add_manifest(path.rpartition("/")[2], body, self.headers.get("Content-Type", ""))
            self.answer(201, {"Docker-Content-Digest": digest}, b"")
        else:
            media_type, data = registry.manifests.get(path.rpartition("/")[2], ("", None))
            self._object("/manifests/", data, media_type)

    def _object(self, kind: str, data: bytes | None, media_type: str = "application/octet-stream") -> None:
        if data is None:
            body = json.dumps({"errors": [{"code": "UNKNOWN", "message": f"no such thing in {kind}"}]}).encode()
            answer = Answer(self, 404, {}, body)
        else:
            answer = self._good_answer(data, media_type)
        fault = self.registry.fault()
        if fault is None:
            answer.send()
        else:
            fault(answer)

    def _good_answer(self, data: bytes, media_type: str) -> Answer:
        headers = {"Content-Type": media_type, "Docker-Content-Digest": digest_of(data)}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None:
            return Answer(self, 200, headers, data, data)
        start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
        if start >= len(data):
            return Answer(self, 416, {"Content-Range": f"bytes */{len(data)}"}, b"")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return Answer(self, 206, headers, data[start:stop], data)

    def _upload(self, body: bytes) -> None:
        if self.command == "POST":
            fault = self.registry.fault()
            answer = Answer(self, 202, {"Location": f"{urlsplit(self.path).path}session?state=1"}, b"")
            answer.send() if fault is None else fault(answer)
            return
        digest = parse_qs(urlsplit(self.path).query)["digest"][0]
        if digest_of(body) != digest:
            self.answer(400, {}, b'{"errors":[{"code":"DIGEST_INVALID"}]}')
            return
        fault = self.registry.fault()
        if fault is None:
            self.registry.blobs[digest] = body
            self.answer(201, {}, b"")
        else:
            fault(Answer(self, 201, {}, b""))

    def _basic_ok(self) -> bool:
        wanted = base64.b64encode(f"{self.registry.user}:{self.registry.password}".encode()).decode()
        return self.headers.get("Authorization") == f"Basic {wanted}"

    def _authorized(self) -> bool:
        if self.registry.auth == "basic":
            return self._basic_ok()
        if self.registry.auth == "bearer":
            return self.headers.get("Authorization", "").removeprefix("Bearer ") in self.registry.tokens
        return True

    def refuse(self) -> None:
        """Answer 401, with the challenge."""
        if self.registry.auth == "basic":
            challenge = 'Basic realm="tests"'
        else:
            realm = self.registry.realm or f"http://{self.registry.host}/token"
            challenge = f'Bearer realm="{realm}",service="tests"'
        self.answer(401, {"WWW-Authenticate": challenge}, b'{"errors":[{"code":"UNAUTHORIZED"}]}')

    def _token(self) -> None:
        registry = self.registry
        registry.tokens_issued += 1
        token = f"token-{registry.tokens_issued}"
        body = json.dumps({"token": token, "expires_in": registry.token_life_s}).encode()
        good = self._basic_ok()
        answer = Answer(self, 200 if good else 401, {}, body if good else b"")
        if good:
            registry.tokens.add(token)
        answer.send() if registry.token_fault is None else registry.token_fault(answer)


def status(code: int, **headers: str) -> Fault:
    """Answer with an error status."""

    def fault(answer: Answer) -> None:
        fields = {key.replace("_", "-"): value for key, value in headers.items()}
        answer.handler.answer(code, fields, b'{"errors":[{"code":"BROKEN","message":"on purpose"}]}')

    return fault


def short_body(count: int) -> Fault:
    """Promise all and break off after ``count`` bytes."""

    def fault(answer: Answer) -> None:
        answer.handler.start(answer.status, {**answer.headers, "Content-Length": str(len(answer.body))})
        answer.handler.wfile.write(answer.body[:count])
        answer.handler.close_connection = True

    return fault


def reset(count: int) -> Fault:
    """Send ``count`` bytes of the body, then reset the connection."""

    def fault(answer: Answer) -> None:
        answer.handler.start(answer.status, {**answer.headers, "Content-Length": str(len(answer.body))})
        answer.handler.wfile.write(answer.body[:count])
        answer.handler.wfile.flush()
        linger = struct.pack("ii", 1, 0)
        answer.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        answer.handler.close_connection = True

    return fault


def wrong_bytes(answer: Answer) -> None:
    """Send a body of the right length and other content."""
    answer.body = bytes(byte ^ 0x5A for byte in answer.body)
    answer.send()


def flipped_bits(every: int) -> Fault:
    """Send the right length with one bit wrong in each stretch of ``every`` bytes."""

    def fault(answer: Answer) -> None:
        body = bytearray(answer.body)
        for position in range(min(every, len(body)) // 2, len(body), every):
            body[position] ^= 0x10
        answer.body = bytes(body)
        answer.send()

    return fault


def longer_body(answer: Answer) -> None:
    """Send more than the range asked for, under its Content-Range."""
    answer.body += b"more than asked for"
    answer.send()


def other_range(answer: Answer) -> None:
    """Answer 206 for the bytes just before the wanted ones."""
    answer.headers["Content-Range"] = f"bytes 0-{len(answer.body) - 1}/{len(answer.whole)}"
    answer.send()


def no_content_range(answer: Answer) -> None:
    """Answer 206 without saying for which bytes."""
    answer.headers.pop("Content-Range", None)
    answer.send()


def whole_blob(answer: Answer) -> None:
    """Ignore the range: 200 with everything. A refusal (a token that has expired) stays a refusal."""
    if answer.status == 206:
        answer.headers.pop("Content-Range", None)
        answer.status, answer.body = 200, answer.whole
    answer.send()


def chunked(answer: Answer) -> None:
    """Send the body in chunks, without a Content-Length."""
    answer.handler.start(answer.status, {**answer.headers, "Transfer-Encoding": "chunked"})
    for start in range(0, len(answer.body), 7000):
        chunk = answer.body[start : start + 7000]
        answer.handler.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    answer.handler.wfile.write(b"0\r\n\r\n")


def chunked_longer(answer: Answer) -> None:
    """Send more than the range asked for, in chunks."""
    answer.body += b"more than asked for"
    chunked(answer)


def silence(answer: Answer) -> None:
    """Never answer."""
    answer.handler.closing.wait()
    answer.handler.close_connection = True


def close_at_once(answer: Answer) -> None:
    """Close the connection without a word."""
    answer.handler.close_connection = True


def garbage(answer: Answer) -> None:
    """Answer something that is not HTTP."""
    answer.handler.wfile.write(b"\x00\xff this is not HTTP\r\n\r\n")
    answer.handler.close_connection = True


def dripping(interval_s: float) -> Fault:
    """Send the body a byte at a time: never silent for long, never done."""

    def fault(answer: Answer) -> None:
        answer.handler.start(answer.status, {**answer.headers, "Content-Length": str(len(answer.body))})
        _drip(answer, answer.body, interval_s)

    return fault


drip = dripping(0.1)


def drip_headers(answer: Answer) -> None:
    """Send the very headers a byte at a time."""
    _drip(answer, b"HTTP/1.1 200 OK\r\n" + b"X-Slow: slow\r\n" * 1000, 0.1)


def _drip(answer: Answer, data: bytes, interval_s: float) -> None:
    answer.handler.close_connection = True
    for byte in data:
        answer.handler.wfile.write(bytes([byte]))
        if answer.handler.closing.wait(interval_s):
            return


def redirect(url: str) -> Fault:
    """Answer 307 to ``url``; "{digest}" in it is the blob's."""

    def fault(answer: Answer) -> None:
        digest = answer.handler.path.rpartition("/")[2]
        answer.handler.answer(307, {"Location": url.format(digest=digest)}, b"moved")

    return fault


def slowly(delay_s: float) -> Fault:
    """Give the good answer after a while."""

    def fault(answer: Answer) -> None:
        time.sleep(delay_s)
        answer.send()

    return fault
