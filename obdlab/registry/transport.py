"""HTTP exchanges with kept connections, each under a deadline that a dripping server cannot stretch.

urllib3's timeouts count silence: a server that sends one byte a second never trips them. Here every receive waits at
most until the deadline that the calling thread has set with :func:`obdlab.registry.deadline.deadline_of_thread`.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any, cast

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from obdlab.registry.deadline import thread_deadline
from obdlab.registry.failures import TRANSPORT_ERRORS, RegistryError, from_exception

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import IO

_HOSTS_KEPT = 32
# As many as a device has threads that wait for a registry: one more would be opened anew for each request.
_CONNECTIONS_PER_HOST = 64
# 16 KiB, urllib3's default, costs a syscall and a TLS record set-up more often than needed.
_SEND_BLOCK = 128 << 10


class Transport:
    """Sends requests over pools of connections. Thread-safe. Redirects are the caller's business."""

    def __init__(self, *, silence_s: float, user_agent: str) -> None:
        self._silence_s = silence_s
        self._user_agent = user_agent
        self._lock = threading.Lock()
        self._plain = _pool_manager()
        self._tls: urllib3.PoolManager | None = None

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        doing: str,
        body: bytes | IO[bytes] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """Return the response with its body unread; ``failures.discard`` it if the body is not read to its end.

        Raises RegistryError, temporary unless the URL or the server's certificate is wrong.
        """
        timeout = self._timeout(doing)
        try:
            return self._pools(url).urlopen(
                method,
                url,
                redirect=False,
                retries=False,
                body=body,
                headers={"User-Agent": self._user_agent, "Accept-Encoding": "identity", **headers},
                timeout=timeout,
                preload_content=False,
                decode_content=False,
            )
        except (*TRANSPORT_ERRORS, ValueError) as error:  # ValueError: a header or URL http.client refuses
            raise from_exception(error, doing) from error

    def close(self) -> None:
        """Close idle connections; those in use are closed when they are given back."""
        for manager in (self._plain, self._tls):
            if manager is None:
                continue
            pools = [manager.pools.get(key) for key in manager.pools.keys()]  # noqa: SIM118 - no Mapping to iterate
            manager.clear()
            # Left to itself a pool closes them when it is collected, and an error kept somewhere keeps the pool.
            for pool in pools:
                if pool is not None:
                    pool.close()

    def _timeout(self, doing: str) -> urllib3.Timeout:
        deadline = thread_deadline()
        left = self._silence_s if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise RegistryError(f"{doing}: deadline passed", temporary=True)
        # A name often has two addresses, and each is given the connect time.
        return urllib3.Timeout(connect=min(self._silence_s, left / 2), read=self._silence_s)

    def _pools(self, url: str) -> urllib3.PoolManager:
        if not url.startswith("https:"):
            return self._plain
        with self._lock:
            if self._tls is None:
                # Loading the CA certificates takes tens of ms and some MiB: only once, and only if wanted.
                context = ssl.create_default_context()
                context.sslsocket_class = _DeadlineTLSSocket
                self._tls = _pool_manager(ssl_context=context)
            return self._tls


def _pool_manager(**options: Any) -> urllib3.PoolManager:
    pools = urllib3.PoolManager(
        num_pools=_HOSTS_KEPT, maxsize=_CONNECTIONS_PER_HOST, block=False, blocksize=_SEND_BLOCK, **options
    )
    pools.pool_classes_by_scheme = {"http": _PlainPool, "https": _TLSPool}
    return pools


class _DeadlineMixin:
    # Shortens the time-out of each socket call to what is left until the thread's deadline.
    _silence: float | None = None

    def settimeout(self, value: float | None) -> None:
        self._silence = value
        super().settimeout(value)  # type: ignore[misc]

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self._shorten_timeout()
        return cast("int", super().recv_into(*args, **kwargs))  # type: ignore[misc]

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        self._shorten_timeout()
        super().sendall(*args, **kwargs)  # type: ignore[misc]

    def _shorten_timeout(self) -> None:
        deadline = thread_deadline()
        if deadline is None:
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("deadline passed")
        super().settimeout(left if self._silence is None else min(left, self._silence))  # type: ignore[misc]


class _DeadlineSocket(_DeadlineMixin, socket.socket):
    pass


class _DeadlineTLSSocket(_DeadlineMixin, ssl.SSLSocket):
    pass


class _PlainConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        plain = super()._new_conn()
        timeout = plain.gettimeout()
        ours = _DeadlineSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())
        ours.settimeout(timeout)
        return ours


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = HTTPSConnection
