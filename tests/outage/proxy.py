"""A proxy before a real registry that spoils answers on command, and counts each one it spoiled.

What reaches the client is the real registry's answer, or what a fault of :mod:`tests.registry.faulty` makes of it.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from tests.registry.faulty import Answer, Answering, Fault, Server

_UPSTREAM_TIMEOUT_S = 20.0
_NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class NamedFault(Protocol):
    """A fault and what it is counted under."""

    @property
    def name(self) -> str: ...

    @property
    def fault(self) -> Fault | None: ...


class OutageProxy:
    """Spoils answers to GETs of blobs; all else passes. ``host`` is what references begin with."""

    def __init__(self, upstream: str, tls: ssl.SSLContext | None = None) -> None:
        self.upstream = upstream
        self.port = 0
        self.storage_port = 0
        #: Faults that were carried out, by name; each before its first byte.
        self.injected: Counter[str] = Counter()
        #: GETs of blobs that came, spoiled or not.
        self.asked = 0
        #: Who we are under TLS, for connections to come.
        self.tls = tls
        self.handshakes_failed = 0
        #: Storage URLs from before then are good no longer.
        self.signed_since = 0.0
        self.closing = threading.Event()
        self.servers: list[Server] = []
        self._lock = threading.Lock()
        self._next: deque[NamedFault] = deque()
        self._always: NamedFault | None = None
        self._sometimes: tuple[float, Sequence[NamedFault], random.Random] | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def next(self, fault: NamedFault, times: int = 1) -> None:
        """Spoil the coming answers."""
        with self._lock:
            self._next.extend([fault] * times)

    def always(self, fault: NamedFault) -> None:
        """Spoil every answer until :meth:`good`."""
        self._always = fault

    def sometimes(self, share: float, faults: Sequence[NamedFault], seed: int = 1) -> None:
        """Spoil this share of the answers, each by a fault chosen at random."""
        self._sometimes = share, faults, random.Random(seed)

    def good(self) -> None:
        """Spoil nothing more, and take no storage URL that was given out before."""
        with self._lock:
            self._next.clear()
        self._always = self._sometimes = None
        self.signed_since = time.time()

    def cut(self) -> None:
        """Break all connections."""
        for server in self.servers:
            server.hang_up()

    def choose(self) -> NamedFault | None:
        """Count a request, and return the fault it is to have."""
        with self._lock:
            self.asked += 1
            fault = self._next.popleft() if self._next else self._always
            if fault is None and self._sometimes is not None:
                share, faults, chooser = self._sometimes
                if chooser.random() < share:
                    fault = chooser.choice(faults)
            if fault is not None:
                self.injected[fault.name] += 1
            return fault


@contextmanager
def outage_proxy(upstream: str, *, tls: ssl.SSLContext | None = None) -> Iterator[OutageProxy]:
    """Run one on a free loopback port before ``upstream`` ("host:port"), with a second port as its blob storage."""
    proxy = OutageProxy(upstream, tls)
    with _serving(proxy) as proxy.storage_port, _serving(proxy) as proxy.port:
        try:
            yield proxy
        finally:
            proxy.closing.set()


@contextmanager
def _serving(proxy: OutageProxy) -> Iterator[int]:
    server = _ProxyServer(("127.0.0.1", 0), _ProxyHandler)
    server.proxy = proxy
    proxy.servers.append(server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        proxy.closing.set()
        server.shutdown()
        server.hang_up()
        thread.join()
        server.server_close()


class _ProxyServer(Server):
    proxy: OutageProxy

    def finish_request(self, request: Any, client_address: Any) -> None:
        # In the connection's own thread: a client that says nothing must not keep others out.
        tls = self.proxy.tls
        if tls is None or self.server_address[1] == self.proxy.storage_port:
            super().finish_request(request, client_address)
            return
        request.settimeout(_UPSTREAM_TIMEOUT_S)
        try:
            with tls.wrap_socket(request, server_side=True) as secured:
                self.connections.add(secured)
                super().finish_request(secured, client_address)
            self.connections.discard(secured)
        except ssl.SSLError:  # a client that refuses our certificate says so
            self.proxy.handshakes_failed += 1


class _ProxyHandler(Answering):
    server: _ProxyServer
    _to_upstream: http.client.HTTPConnection | None = None

    @property
    def proxy(self) -> OutageProxy:
        return self.server.proxy

    @property
    def closing(self) -> threading.Event:
        return self.proxy.closing

    def do_GET(self) -> None:  # noqa: N802 - http.server looks for this name
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path)
        if self.server.server_address[1] == self.proxy.storage_port:
            self._from_storage(path.path, parse_qs(path.query))
            return
        is_blob = self.command == "GET" and "/blobs/" in path.path
        chosen = self.proxy.choose() if is_blob else None
        answer = self._fetch(self.path, body)
        if chosen is None or chosen.fault is None:
            answer.send()
        else:
            chosen.fault(answer)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815 - http.server looks for these names

    def finish(self) -> None:
        super().finish()
        if self._to_upstream is not None:
            self._to_upstream.close()

    def _from_storage(self, path: str, query: dict[str, list[str]]) -> None:
        # A signed URL: good until the time in it, and no token is asked for (nor may any come here).
        issued, life_s = float(query["issued"][0]), float(query["life"][0])
        if time.time() > issued + life_s or issued < self.proxy.signed_since or self.headers.get("Authorization"):
            self.answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
            return
        answer = self._fetch(path, b"", authorization=query["bearer"][0])
        answer.send()

    def _fetch(self, path: str, body: bytes, authorization: str | None = None) -> Answer:
        # ``authorization`` instead of the client's own; "" is none.
        headers = {key: value for key, value in self.headers.items() if key.lower() != "connection"}
        if authorization is not None:
            headers.pop("Authorization", None)
        if authorization:
            headers["Authorization"] = authorization
        try:
            status, fields, data = self._ask_upstream(path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            return Answer(self, 502, {}, f"upstream: {error}".encode())

        def whole() -> bytes:
            return self._ask_upstream(path, body, {k: v for k, v in headers.items() if k.lower() != "range"})[2]

        return _LazyAnswer(self, status, fields, data, ask_for_whole=whole)

    def _ask_upstream(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        connection = self._to_upstream
        if connection is None:
            connection = http.client.HTTPConnection(self.proxy.upstream, timeout=_UPSTREAM_TIMEOUT_S)
            self._to_upstream = connection
        try:
            connection.request(self.command, path, body, headers)
            with contextlib.closing(connection.getresponse()) as response:
                data = response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            self._to_upstream = None
            raise
        fields = {key: value for key, value in response.headers.items() if key.lower() not in _NOT_PASSED_ON}
        if self.command == "HEAD":
            fields["Content-Length"] = response.headers.get("Content-Length", "0")
        return response.status, fields, data


class _LazyAnswer(Answer):
    # The whole blob is fetched only for a fault that wants it.
    def __init__(
        self,
        handler: Answering,
        status: int,
        headers: dict[str, str],
        body: bytes,
        *,
        ask_for_whole: Callable[[], bytes],
    ) -> None:
        self.handler, self.status, self.headers, self.body = handler, status, headers, body
        self._ask_for_whole = ask_for_whole

    @property
    def whole(self) -> bytes:  # type: ignore[override]
        return self._ask_for_whole()


def redirect_to_storage(life_s: float) -> Fault:
    """Send the client to the proxy's storage port, by a URL that is good for ``life_s``."""

    def fault(answer: Answer) -> None:
        if answer.status not in (200, 206):  # the registry's own refusal comes first
            answer.send()
            return
        handler = answer.handler
        assert isinstance(handler, _ProxyHandler)
        bearer = handler.headers.get("Authorization", "")
        query = f"issued={time.time()}&life={life_s}&bearer={bearer.replace(' ', '%20')}"
        path = urlsplit(handler.path).path
        handler.answer(307, {"Location": f"http://127.0.0.1:{handler.proxy.storage_port}{path}?{query}"}, b"")

    return fault


def token_refused(answer: Answer) -> None:
    """Give the registry's own answer to a request without a token: 401 and its challenge."""
    assert isinstance(answer.handler, _ProxyHandler)
    answer.handler._fetch(answer.handler.path, b"", authorization="").send()
