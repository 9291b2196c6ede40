"""Live snapshots over HTTP: ``POST /snapshot`` with a JSON object of ``dev_id`` and ``config``.

Answers are JSON objects of ``success`` and ``message``, with the original's codes and sentences (overlaybd live
snapshot API). A snapshot redirects a device's writes, so callers must prove that they may: on a unix socket (mode
0600) by the kernel's peer credentials, on TCP by a token. A web page cannot call it: the request is a POST of JSON
without an Origin, and on TCP the Host is checked. An answer shows only the code of a failure; the log has the cause,
which may quote files. ``open_to_all`` is the original's way: any verb, parameters in the query, no token.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import json
import logging
import os
import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from obdlab.errors import DeviceError, ObdlabError
from obdlab.observe.printable import printable
from obdlab.server import wire
from obdlab.server.deadlinereader import DeadlineReader

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

#: Time for one request to arrive, and for the client to take its answer.
REQUEST_TIMEOUT_S = 10.0
#: A connection is closed when it is silent for this long.
_IDLE_TIMEOUT_S = 60.0
_MAX_CONNECTIONS = 64
_MAX_BODY = 1 << 16
#: Characters of a verb that the log shows; the longest registered one has 17.
_MOST_OF_VERB = 20
_JSON = "application/json"


class UnknownDeviceError(ObdlabError, code="unknown-device"):
    """No device has this id."""


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class SnapshotApi(ThreadingHTTPServer):
    """Listens on ``address``, a Path (unix socket) or ``http://HOST:PORT``; ``take(dev_id, config)`` snapshots.

    ``take`` raises UnknownDeviceError, or another ObdlabError if it fails. On TCP callers need the ``token``, unless
    the service is ``open_to_all``. Raises DeviceError if the address is malformed or taken, or if a token is missing.
    Serve with ``serve_forever``, end with ``shutdown`` and ``server_close``.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(
        self,
        address: str | Path,
        take: Callable[[str, str], object],
        *,
        token: str = "",
        open_to_all: bool = False,
    ) -> None:
        self.take = take
        self.open_to_all = open_to_all
        self._token = token.encode()
        self._path = address if isinstance(address, Path) else None
        self._host = ""
        self._free = threading.Semaphore(_MAX_CONNECTIONS)
        if self._path is None and not token and not open_to_all:
            raise DeviceError(f"{address}: a token is needed to listen on TCP")
        try:
            if isinstance(address, Path):
                super().__init__(("", 0), _Handler, bind_and_activate=False)
                self.socket.close()
                self.socket = wire.listen(address)
            else:
                self._host, port = _host_and_port(address)
                found = socket.getaddrinfo(self._host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
                self.address_family = found[0]
                super().__init__(found[4][:2], _Handler)  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            raise DeviceError(f"{address}: cannot listen there: {error}") from error

    @property
    def url(self) -> str:
        """Its address: a URL, or the path of the socket."""
        if self._path is not None:
            return str(self._path)
        host, port = self.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else host
        return f"http://{shown!s}:{port}"

    def server_close(self) -> None:
        super().server_close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    # The base class logs a client's address; unix sockets have none.
    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        return connection, address or ("unix socket", 0)

    def check_caller(self, connection: socket.socket, headers: Any) -> None:
        """Raise _RefusedError unless this caller may ask for a snapshot."""
        if self._path is not None:
            uid = wire.peer_of(connection).uid
            if uid not in (0, os.geteuid()):
                raise _RefusedError(HTTPStatus.FORBIDDEN, "Not allowed")
        if self.open_to_all:
            return
        if headers.get("Origin") is not None:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "Not allowed from a web page")
        if self._path is None:
            if not self._is_addressed(headers.get("Host", "")):
                raise _RefusedError(HTTPStatus.MISDIRECTED_REQUEST, "Not the host of this service")
            scheme, _, given = headers.get("Authorization", "").partition(" ")
            if not hmac.compare_digest(given.strip().encode("latin-1"), self._token) or scheme.lower() != "bearer":
                raise _RefusedError(HTTPStatus.UNAUTHORIZED, "A token is needed")

    # An attacker's host name could resolve to this address (DNS rebinding); a literal address could not.
    def _is_addressed(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
            name, port = parts.hostname or "", parts.port or 80
        except ValueError:
            return False
        if port != self.server_address[1]:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in (self._host.lower(), "localhost")
        return True

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
        self._reader = DeadlineReader(self.connection, request_s=REQUEST_TIMEOUT_S, idle_s=_IDLE_TIMEOUT_S)
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        self._reader.expect()
        super().handle_one_request()

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        try:
            body = self._body()
            self.connection.settimeout(REQUEST_TIMEOUT_S)
            self.server.check_caller(self.connection, self.headers)
            parts = urlsplit(self.path)
            if parts.path != "/snapshot":
                raise _RefusedError(HTTPStatus.NOT_FOUND, "Not found")
            asked = self._parameters(parts.query, body)
            dev_id, config = asked.get("dev_id", ""), asked.get("config", "")
            if not dev_id or not config:
                raise _RefusedError(HTTPStatus.BAD_REQUEST, "Missing dev_id or config in snapshot request")
            self._take(dev_id, config)
        except _RefusedError as refusal:
            self._send(refusal.status, str(refusal))
        else:
            self._send(HTTPStatus.OK, "Snapshot created successfully")

    def _take(self, dev_id: str, config: str) -> None:
        try:
            self.server.take(dev_id, config)
        except UnknownDeviceError as error:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "Image file not found") from error
        except ObdlabError as error:
            log.error("snapshot of %s with %s: %s", dev_id, config, error)
            raise _RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, "Failed to create snapshot") from error

    # Merges the query's parameters, as in the original's requests, with the body's.
    def _parameters(self, query: str, body: bytes) -> dict[str, str]:
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        if self.server.open_to_all:
            return asked
        if self.command != "POST":
            raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "Only POST")
        if self.headers.get_content_type() != _JSON or "Content-Type" not in self.headers:
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"Only {_JSON}")
        try:
            return asked | (msgspec.json.decode(body, type=dict[str, str]) if body.strip() else {})
        except msgspec.ValidationError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "The body is not a JSON object of texts") from error
        except (ValueError, RecursionError) as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "The body is not JSON") from error

    # Reads the whole body: the next request on the connection comes after it.
    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        too_long = not length.isascii() or not length.isdecimal() or int(length[:10]) > _MAX_BODY or len(length) > 10
        if too_long or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body is too long")
        return self.rfile.read(int(length))

    # Messages are fixed, as in the original: the text of a failure could quote the file that a caller names.
    def _send(self, status: HTTPStatus, message: str) -> None:
        body = json.dumps({"success": status == HTTPStatus.OK, "message": message}).encode()
        self.send_response(status)
        self.send_header("Content-Type", _JSON)
        self.send_header("Content-Length", str(len(body)))
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "POST")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # For errors that the base class finds in a request before it knows the protocol version.
    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.close_connection = True
        self.request_version = self.protocol_version
        self.command = self.command or ""
        self._send(HTTPStatus(code), HTTPStatus(code).phrase)

    # Logs the verb alone: the rest of a request may be a token. Clients that no check has passed yet choose the verb.
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        verb = (self.command or "")[:_MOST_OF_VERB]
        log.info("%s: %s %s", self.client_address[0], printable(verb), args[1] if len(args) > 1 else "")
