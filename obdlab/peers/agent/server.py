"""The agent's HTTP side: GET and HEAD of blobs, with ranges; ``/alive`` for other agents; metrics for this host.

Threads, as in all of obdlab's servers: the data comes from a cache and clients that block. Their number is bounded.
"""

from __future__ import annotations

import io
import ipaddress
import logging
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from obdlab.errors import DeviceError, ObdlabError
from obdlab.formats.decimal import decimal
from obdlab.formats.oci import is_digest
from obdlab.observe.printable import printable
from obdlab.peers.agent.agent import DEADLINE_S
from obdlab.peers.agent.asked import HOPS_HEADER, RefusedError, parse_range
from obdlab.peers.agent.signature import is_signed
from obdlab.peers.agent.trees import TREE_PATH, Place
from obdlab.peers.agent.watch import ALIVE_PATH, WAITS_HEADER
from obdlab.registry.errors import RegistryError
from obdlab.server.deadlinereader import DeadlineReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.peers.agent.agent import Agent
    from obdlab.peers.agent.sharedblob import SharedBlob

log = logging.getLogger(__name__)

#: Most connections at a time, idle ones included.
MOST_CONNECTIONS = 256
# Time for a request to arrive, for the client to take the next piece, and for an idle connection.
_REQUEST_S = 10.0
_TAKE_S = 10.0
_IDLE_S = 60.0
_MOST_LOGGED = 300
# Answers to a request carry this much at a time, so that an upload limit is kept smoothly.
_PIECE = 64 << 10


class UploadLimit:
    """Bytes per second to other hosts, of all connections together; 0: no limit."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait_for(self, length: int) -> None:
        """Wait until this many bytes may be sent."""
        if not self._rate:
            return
        now = time.monotonic()
        with self._lock:
            begin = max(now, self._free_at)
            self._free_at = begin + length / self._rate
        time.sleep(begin - now)


class PeerServer(ThreadingHTTPServer):
    """Listens on ``address`` from construction on; port 0: any free one. Serve with ``serve_forever``.

    Set ``agent`` before. Raises DeviceError if the address cannot be used.
    """

    agent: Agent

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], upload_limit: float = 0.0) -> None:
        self.upload = UploadLimit(upload_limit)
        self._free = threading.Semaphore(MOST_CONNECTIONS)
        host, port = address
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise DeviceError(f"peer: cannot listen on {host}:{port}: {error}") from error

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            log.warning("%s: more than %d connections", client_address[0], MOST_CONNECTIONS)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("%s: connection failed", client_address[0])


class _Handler(BaseHTTPRequestHandler):
    server: PeerServer
    protocol_version = "HTTP/1.1"
    server_version = "obdlab"
    sys_version = ""
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self._reader = DeadlineReader(self.connection, request_s=_REQUEST_S, idle_s=_IDLE_S)
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        self._reader.expect()
        super().handle_one_request()

    def do_GET(self) -> None:
        self.connection.settimeout(_TAKE_S)
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            self.close_connection = True
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "a body is not wanted")
            return
        path = urlsplit(self.path).path
        if path == ALIVE_PATH:
            self._live()
            return
        if path == TREE_PATH:
            self._place()
            return
        if self.path in ("/metrics", "/healthz") and self._is_local:
            self._show()
            return
        try:
            self._serve()
        except RefusedError as refusal:
            if refusal.status == HTTPStatus.LOOP_DETECTED:
                self.server.agent.tallies.add("loops")
            self._refuse(refusal.status, str(refusal))
        except RegistryError as error:
            status = HTTPStatus.BAD_GATEWAY
            if error.status in (401, 403, 404):
                status = HTTPStatus(error.status)
            self._refuse(status, str(error))
        except (ObdlabError, TimeoutError) as error:
            self._refuse(HTTPStatus.BAD_GATEWAY, str(error))

    do_HEAD = do_GET  # noqa: N815 - the base class's name

    def _live(self) -> None:
        digest, offset = (self._given().get(name, "") for name in ("digest", "offset"))
        at = decimal(offset)
        waits = is_digest(digest) and at is not None and self.server.agent.waits_for(digest, at)
        self._answer(HTTPStatus.NO_CONTENT, {WAITS_HEADER: "yes"} if waits else {})

    def _given(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}

    def _place(self) -> None:
        agent = self.server.agent
        given = self._given()
        identity, member, lost = (given.get(name, "") for name in ("identity", "member", "lost"))
        key, own_id = agent.options.key, agent.options.own_id
        if agent.manager is None:
            self._refuse(HTTPStatus.NOT_FOUND, "this agent keeps no trees")
        elif key and not is_signed(key, own_id, self.path, self.headers, time.time()):  # type: ignore[arg-type]
            self._refuse(HTTPStatus.FORBIDDEN, "not signed with the key of these agents")
        elif not is_digest(identity) or not agent.is_member(member):
            self._refuse(HTTPStatus.BAD_REQUEST, "wanted a digest and a member of the list")
        else:
            data = msgspec.json.encode(Place(list(agent.manager.place(identity, member, lost))))
            self._answer(HTTPStatus.OK, {"Content-Type": "application/json", "Content-Length": str(len(data))})
            self.wfile.write(data)

    @property
    def _is_local(self) -> bool:
        host = str(self.client_address[0]).partition("%")[0]
        address = ipaddress.ip_address(host)
        mapped = getattr(address, "ipv4_mapped", None)
        # The kernel takes no packets of other hosts that come from one of its own addresses.
        return (
            bool((mapped or address).is_loopback) or host == str(self.connection.getsockname()[0]).partition("%")[0]
        )

    def _serve(self) -> None:
        agent = self.server.agent
        options = agent.options
        asked = options.rules.parse(self.path, self.headers, options.own_id)  # type: ignore[arg-type]
        reader = HOPS_HEADER not in self.headers
        signed = is_signed(options.key, options.own_id, self.path, self.headers, time.time())  # type: ignore[arg-type]
        if options.key and not reader and not signed:
            raise RefusedError(HTTPStatus.FORBIDDEN, "not signed with the key of these agents")
        agent.tallies.passed(len(asked.hops))
        blob = agent.open(
            asked,
            local=reader and self._is_local,
            trusted=signed,
            authorization=self.headers.get("Authorization", ""),
        )
        try:
            self._send(blob, asked.hops, to="local" if reader and self._is_local else "peer")
        finally:
            blob.release()

    def _send(self, blob: SharedBlob, hops: tuple[str, ...], to: str) -> None:
        text = self.headers.get("Range", "")
        begin, end = 0, blob.size
        try:
            if text:
                begin, end = parse_range(text, blob.size)
        except RefusedError as refusal:
            self._answer(refusal.status, {"Content-Range": f"bytes */{blob.size}"})
            return
        headers = {
            "Content-Length": str(end - begin),
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }
        if text:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{blob.size}"
        status = HTTPStatus.PARTIAL_CONTENT if text else HTTPStatus.OK
        if self.command == "HEAD":
            self._answer(status, headers)
            return
        pieces = blob.read(begin, end, hops, DEADLINE_S)
        first = next(pieces)  # the status is not sent before there is a byte
        self._answer(status, headers)
        try:
            self._write(first, to)
            for piece in self._later(blob, pieces):
                self._write(piece, to)
        except OSError as error:
            self.close_connection = True
            log.debug("%s: went away: %s", self.client_address[0], error)

    # Ends early if the rest cannot be had: the client misses bytes, and asks elsewhere.
    def _later(self, blob: SharedBlob, pieces: Iterator[tuple[bytes, str]]) -> Iterator[tuple[bytes, str]]:
        try:
            yield from pieces
        except (ObdlabError, TimeoutError) as error:
            self.close_connection = True
            log.warning("%s: answer broken off: %s", blob.wanted.name, error)

    def _write(self, piece: tuple[bytes, str], to: str) -> None:
        data, place = piece
        tallies = self.server.agent.tallies
        view = memoryview(data)
        for at in range(0, len(view), _PIECE):
            part = view[at : at + _PIECE]
            if to == "peer":
                self.server.upload.wait_for(len(part))
            self.wfile.write(part)
        tallies.add("sent_bytes", len(data), to)
        tallies.add("served_bytes", len(data), place)

    def _show(self) -> None:
        data = b"ok\n" if self.path == "/healthz" else self.server.agent.tallies.text()
        self._answer(HTTPStatus.OK, {"Content-Type": "text/plain; version=0.0.4", "Content-Length": str(len(data))})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        if status >= 500:
            log.info("%s: %d: %s", self.client_address[0], status, message[:_MOST_LOGGED])
        data = f"{message[:_MOST_LOGGED]}\n".encode("utf-8", "replace")
        try:
            self._answer(status, {"Content-Type": "text/plain", "Content-Length": str(len(data))})
            if self.command != "HEAD":
                self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def _answer(self, status: HTTPStatus, headers: dict[str, str] | None = None) -> None:
        self.server.agent.tallies.add("requests", label=str(status.value))
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | (headers or {})).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        log.debug("%s: %s", self.client_address[0], printable(format % args)[:_MOST_LOGGED])
