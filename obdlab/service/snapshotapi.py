"""The original's HTTP interface for live snapshots: ``/snapshot?dev_id=ID&config=PATH``, with any verb.

Answers are JSON objects of ``success`` and ``message``, with the original's codes and sentences (overlaybd live
snapshot API). There is no authentication: it belongs on a loopback address.
"""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from obdlab.errors import DeviceError, ObdlabError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

#: Time for one request to come in, and for its answer to be taken.
REQUEST_TIMEOUT_S = 10.0
#: A connection is closed when it is silent for this long.
_IDLE_TIMEOUT_S = 60.0
_MAX_CONNECTIONS = 64
_MAX_BODY = 1 << 16


class UnknownDeviceError(ObdlabError):
    """No device has this id."""


class SnapshotApi(ThreadingHTTPServer):
    """Listens on ``address``, as ``http://127.0.0.1:9862``; ``take(dev_id, config)`` takes the snapshot.

    That raises UnknownDeviceError, or another ObdlabError if it fails. Raises DeviceError if the address is none or
    is taken. Serve with ``serve_forever``, end with ``shutdown`` and ``server_close``.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, address: str, take: Callable[[str, str], object]) -> None:
        self.take = take
        self._free = threading.Semaphore(_MAX_CONNECTIONS)
        try:
            host, port = _host_and_port(address)
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self.address_family = found[0]
            super().__init__(found[4][:2], _Handler)  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            raise DeviceError(f"{address}: cannot listen there: {error}") from error

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else host
        return f"http://{shown!s}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            log.warning("%s: more than %d connections", client_address, _MAX_CONNECTIONS)
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
        log.info("%s: connection failed", client_address)


def _host_and_port(address: str) -> tuple[str, int]:
    parts = urlsplit(address if "//" in address else f"http://{address}")
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.port is None:
        raise ValueError("wanted http://HOST:PORT")
    return parts.hostname, parts.port


class _Handler(BaseHTTPRequestHandler):
    server: SnapshotApi
    protocol_version = "HTTP/1.1"
    server_version = "obdlab"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self._reader = _DeadlineReader(self.connection)
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        self._reader.expect()
        super().handle_one_request()

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        if not self._skip_body():
            return
        self.connection.settimeout(REQUEST_TIMEOUT_S)
        parts = urlsplit(self.path)
        if parts.path != "/snapshot":
            self._send(HTTPStatus.NOT_FOUND, "Not found")
            return
        asked = parse_qs(parts.query)
        dev_id, config = (asked.get(name, [""])[0] for name in ("dev_id", "config"))
        if not dev_id or not config:
            self._send(HTTPStatus.BAD_REQUEST, "Missing dev_id or config in snapshot request")
            return
        try:
            self.server.take(dev_id, config)
        except UnknownDeviceError:
            self._send(HTTPStatus.NOT_FOUND, "Image file not found")
        except ObdlabError as error:
            log.error("snapshot of %s with %s: %s", dev_id, config, error)
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "Failed to create snapshot", reason=str(error))
        else:
            self._send(HTTPStatus.OK, "Snapshot created successfully")

    # Bodies mean nothing here, but the next request on the connection comes after them.
    def _skip_body(self) -> bool:
        length = self.headers.get("Content-Length", "0")
        too_long = not length.isascii() or not length.isdecimal() or int(length[:10]) > _MAX_BODY or len(length) > 10
        if too_long or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Requests have no body")
            return False
        self.rfile.read(int(length))
        return True

    # The original has no reason, and its messages never change.
    def _send(self, status: HTTPStatus, message: str, **reason: str) -> None:
        body = json.dumps({"success": status == HTTPStatus.OK, "message": message, **reason}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # What the base class finds wrong with a request, before it knows what language to answer in.
    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.close_connection = True
        self.request_version = self.protocol_version
        self.command = self.command or ""
        self._send(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        log.info("%s: %s", self.client_address, format % args)


class _DeadlineReader(io.RawIOBase):
    # Reads from a connection; what has begun to come in must be there within its time, however slowly it comes.
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline: float | None = None

    def expect(self) -> None:
        """A new request may begin now."""
        self._deadline = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = _IDLE_TIMEOUT_S if self._deadline is None else self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not come in in time")
        self._connection.settimeout(left)
        length = self._connection.recv_into(buffer)
        if self._deadline is None:
            self._deadline = time.monotonic() + REQUEST_TIMEOUT_S
        return length
