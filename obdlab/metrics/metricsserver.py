"""The exporter's HTTP side: ``/metrics`` as prometheus-client writes it, ``/healthz`` as JSON."""

from __future__ import annotations

import json
import logging
import socket
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from obdlab.errors import DeviceError
from obdlab.metrics.exporter import registry_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from obdlab.metrics.exporter import ObdlabCollector

log = logging.getLogger(__name__)

HEALTH_PATH = "/healthz"
_REQUEST_TIMEOUT_S = 10.0


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False


class _SixServer(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_TIMEOUT_S  # for a client that sends nothing, or takes nothing

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class has it
        log.debug("%s: %s", self.client_address[0], format % args)


def parse_address(text: str) -> tuple[str, int]:
    """Read ADDRESS:PORT, with an IPv6 address in brackets. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdecimal() and int(port) < 65536):
        raise ValueError(f"wanted ADDRESS:PORT, as in 127.0.0.1:9863 or [::1]:9863 (got {text!r})")
    return host, int(port)


class MetricsServer:
    """Listens on ``address`` from construction on; port 0: any free port.

    ``/healthz`` answers with ``health()``, with status 503 unless its "ok" is true. Raises DeviceError if the address
    cannot be used.
    """

    def __init__(
        self,
        address: tuple[str, int],
        collector: ObdlabCollector,
        health: Callable[[], dict[str, Any]],
        *,
        path: str = "/metrics",
    ) -> None:
        metrics = make_wsgi_app(registry_of(collector))

        def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            if environ["PATH_INFO"] == path:
                return cast("Iterable[bytes]", metrics(environ, start_response))
            if environ["PATH_INFO"] == HEALTH_PATH:
                found = health()
                status = "200 OK" if found["ok"] else "503 Service Unavailable"
                return _answer(start_response, status, json.dumps(found, indent=1) + "\n", "application/json")
            text = f"obdlab exporter: {path} and {HEALTH_PATH} are served\n"
            return _answer(start_response, "404 Not Found", text, "text/plain; charset=utf-8")

        host, port = address
        try:
            self._server = make_server(
                host, port, application, _SixServer if ":" in host else _Server, handler_class=_Handler
            )
        except OSError as error:
            raise DeviceError(f"exporter: cannot listen on {host}:{port}: {error.strerror or error}") from error

    @property
    def port(self) -> int:
        """The port it listens at."""
        return int(self._server.server_port)

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        self._server.serve_forever()

    def stop(self) -> None:
        """End :meth:`run`, from another thread."""
        self._server.shutdown()
        self._server.server_close()


def _answer(start_response: Any, status: str, text: str, kind: str) -> Iterable[bytes]:
    data = text.encode()
    start_response(status, [("Content-Type", kind), ("Content-Length", str(len(data)))])
    return [data]
