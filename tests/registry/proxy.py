"""A small P2P proxy as the tests need one: fetches what it is asked for, in each of the forms that are in use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import urllib3

PREFIX = "/accelerator/"
_PASSED_ON = ("Range", "Authorization", "Accept")


@dataclass
class Proxy:
    """A running proxy: what it was asked for, and how it is to fail (a status, "silence", or "lies")."""

    port: int = 0
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    fails_with: int | str = 0
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}{PREFIX.rstrip('/')}"


@contextmanager
def running_proxy(port: int = 0) -> Iterator[Proxy]:
    """Run one on a loopback port."""
    proxy = Proxy()
    pools = urllib3.PoolManager()
    connections: set[Any] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            target = self.path.removeprefix(PREFIX)
            registry = self.headers.get("X-Dragonfly-Registry")
            if registry is not None and target.startswith("/v2/"):
                target = registry + target
            proxy.asked.append((target, self.headers.get("Authorization")))
            if proxy.fails_with == "silence":
                proxy.closing.wait()
                self.close_connection = True
                return
            if isinstance(proxy.fails_with, int) and proxy.fails_with:
                self.send_response(proxy.fails_with)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            headers = {key: self.headers[key] for key in _PASSED_ON if key in self.headers}
            answer = pools.request("GET", target, headers=headers, redirect=False, retries=False)
            self.send_response(answer.status)
            for key in ("Content-Range", "Content-Type", "Location", "WWW-Authenticate"):
                if key in answer.headers:
                    self.send_header(key, answer.headers[key])
            self.send_header("Content-Length", str(len(answer.data)))
            self.end_headers()
            lying = proxy.fails_with == "lies"
            self.wfile.write(bytes(byte ^ 1 for byte in answer.data) if lying else answer.data)

    class Server(ThreadingHTTPServer):
        daemon_threads = False
        request_queue_size = 64

        def process_request(self, request: Any, client_address: Any) -> None:
            connections.add(request)
            super().process_request(request, client_address)

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # clients break off

    server = Server(("127.0.0.1", port), Handler)
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        server.shutdown()
        for connection in tuple(connections):
            with suppress(OSError):
                connection.shutdown(2)
        thread.join()
        server.server_close()
        pools.clear()
