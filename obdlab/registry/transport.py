"""HTTP exchanges over kept connections, each under a deadline that a dripping server cannot stretch.

urllib3's timeouts count silence: a server that sends one byte a second never trips them. Here every receive waits at
most until the deadline that the calling thread has set with :func:`obdlab.registry.deadline.deadline_of_thread`.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError, SSLError

from obdlab.observe.counters import REGISTRY_ANSWERED, REGISTRY_FAILED, REGISTRY_REQUESTS
from obdlab.observe.redact import Redacting
from obdlab.registry import interrupt, pace
from obdlab.registry.deadline import IN_FORCE
from obdlab.registry.dial import Dialer
from obdlab.registry.errors import RegistryError
from obdlab.registry.failures import TRANSPORT_ERRORS, from_exception
from obdlab.registry.framing import Allowance, BoundedReader, FramingError, check_framing
from obdlab.registry.interrupt import is_broken_off
from obdlab.registry.tls import HostTLS, TLSOptions, make_context, tls_of_host

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import IO

_HOSTS_KEPT = 32
# As many as a device has threads waiting for a registry: a further one would be opened again for each request.
_CONNECTIONS_PER_HOST = 64
# 16 KiB, urllib3's default, costs a syscall and a TLS record set-up more often than needed.
_SEND_BLOCK = 128 << 10
# Reasons of servers that refuse our certificate, or do not speak TLS (of our version): trying again will not help.
_FINAL_TLS_REASONS = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "UNSUPPORTED_PROTOCOL",
    "PROTOCOL_VERSION",
    "HANDSHAKE_FAILURE",
    "CERTIFICATE_REQUIRED",
    "BAD_CERTIFICATE",
    "UNKNOWN_CA",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_UNKNOWN",
    "UNSUPPORTED_CERTIFICATE",
    "ACCESS_DENIED",
)
_MOST_HOSTS = 256

# At level debug urllib3 logs whole URLs, including the signatures of storage URLs.
for _name in ("connection", "connectionpool", "poolmanager", "response", "util.retry"):
    logging.getLogger(f"urllib3.{_name}").addFilter(Redacting())


class Transport:
    """Sends requests over pools of connections. Thread-safe. The caller handles redirects.

    ``silence_s`` bounds a connect and each silence. With ``unix_socket`` every plain HTTP request goes there.
    """

    def __init__(
        self,
        *,
        silence_s: float,
        user_agent: str,
        tls: TLSOptions | None = None,
        unix_socket: Path | None = None,
    ) -> None:
        self._silence_s = silence_s
        self._user_agent = user_agent
        self._tls_options = tls or TLSOptions()
        self._lock = threading.Lock()
        self._dialer = Dialer()
        self._plain = self._pool_manager(None, unix_socket)
        # By TLS options, since contexts are costly: tens of ms and some MiB with the system's CAs.
        self._tls: dict[HostTLS, urllib3.PoolManager] = {}
        self._tls_by_host: dict[str, urllib3.PoolManager] = {}

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        doing: str,
        body: bytes | IO[bytes] | None = None,
        http_proxy: str = "",
        authorization: str | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """Return the response with its body unread; ``failures.discard`` it if the body is not read to its end.

        ``http_proxy``, "http://host:port", gets the request in place of the URL's host. ``authorization`` is the
        header of that name.
        Raises RegistryError, temporary unless the URL or a certificate is wrong.
        """
        timeout = self._timeout(doing)
        headers = {"User-Agent": self._user_agent, "Accept-Encoding": "identity", **headers}
        if authorization is not None:
            headers["Authorization"] = authorization
        try:
            first = http_proxy or url
            manager = self._pools(first) if first.startswith("https:") else self._plain
            # A pool, unlike its manager, sends the whole URL with scheme and host, which a proxy needs.
            pool = manager.connection_from_url(http_proxy) if http_proxy else manager
            response: urllib3.BaseHTTPResponse = pool.urlopen(
                method,
                url,
                redirect=False,
                assert_same_host=False,
                retries=False,
                body=body,
                headers=headers,
                timeout=timeout,
                preload_content=False,
                decode_content=False,
            )
            try:
                check_framing(response)
            except FramingError:
                response.close()  # closes the connection, too
                raise
            REGISTRY_REQUESTS.add(label=str(response.status))
            (REGISTRY_FAILED if response.status >= 500 else REGISTRY_ANSWERED).now()
            return response
        except (*TRANSPORT_ERRORS, ValueError) as error:  # ValueError: a header or URL http.client refuses
            _count_failure()
            refusal = _tls_refusal(error)
            if refusal is None:
                raise from_exception(error, doing) from error
            self._look_again(url)
            raise RegistryError(f"{doing}: {_host(url)}: {refusal}") from error

    def close(self) -> None:
        """Close idle connections; connections in use are closed when they are given back."""
        with self._lock:
            managers = [self._plain, *self._tls.values()]
        for manager in managers:
            _close(manager)

    def _timeout(self, doing: str) -> urllib3.Timeout:
        deadline = IN_FORCE.deadline
        left = self._silence_s if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise RegistryError(f"{doing}: no answer in time: deadline passed", temporary=True, timed_out=True)
        # The TLS handshake gets the connect time once more.
        return urllib3.Timeout(connect=min(self._silence_s, left / 2), read=self._silence_s)

    def _pools(self, url: str) -> urllib3.PoolManager:
        # The pools for a host with TLS.
        host = _host(url)
        with self._lock:
            manager = self._tls_by_host.get(host)
            if manager is None:
                tls = tls_of_host(self._tls_options, host)
                manager = self._tls.get(tls)
                if manager is None:
                    manager = self._tls[tls] = self._pool_manager(make_context(tls))
                if len(self._tls_by_host) >= _MOST_HOSTS:
                    self._tls_by_host.clear()
                self._tls_by_host[host] = manager
            return manager

    # After a refused certificate its files are read again: they may have been renewed since.
    def _look_again(self, url: str) -> None:
        with self._lock:
            manager = self._tls_by_host.pop(_host(url), None)
            for key in [key for key, other in self._tls.items() if other is manager]:
                del self._tls[key]
        if manager is not None:
            _close(manager)

    def _pool_manager(self, context: ssl.SSLContext | None, unix_socket: Path | None = None) -> urllib3.PoolManager:
        options: dict[str, Any] = {}
        if context is not None:
            context.sslsocket_class = _DeadlineTLSSocket
            options["ssl_context"] = context
        pools = urllib3.PoolManager(
            num_pools=_HOSTS_KEPT, maxsize=_CONNECTIONS_PER_HOST, block=False, blocksize=_SEND_BLOCK, **options
        )
        # The connection classes hold the way to connect: urllib3 passes no other values down to them.
        ways = {"dialer": self._dialer, "unix_socket": unix_socket}
        plain = type("_PlainConnection", (_PlainConnection,), ways)
        tls = type("_TLSConnection", (_TLSConnection,), ways)
        pools.pool_classes_by_scheme = {
            "http": type("_PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
            "https": type("_TLSPool", (_TLSPool,), {"ConnectionCls": tls}),
        }
        return pools


def _close(manager: urllib3.PoolManager) -> None:
    pools = [manager.pools.get(key) for key in manager.pools.keys()]  # noqa: SIM118 - no Mapping to iterate
    manager.clear()
    # A pool closes its connections only when it is collected, and an error that is kept keeps the pool alive.
    for pool in pools:
        if pool is not None:
            pool.close()


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2].lower()


def _tls_refusal(error: Exception) -> str | None:
    # Returns the meaning of a permanent TLS failure; None for any other failure.
    cause: object = error.args[0] if isinstance(error, SSLError) and error.args else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"TLS certificate refused: {cause.verify_message.rstrip('.')}"
    if not isinstance(cause, ssl.SSLError) or not cause.reason:
        return None
    if cause.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        return "does not speak TLS (plain HTTP is spoken only where asked for)"
    if cause.reason.endswith(_FINAL_TLS_REASONS):
        return f"TLS refused: {cause.reason.lower().replace('_', ' ')}"
    return None


class _DeadlineMixin:
    # Shortens the time-out of each socket call to the time left until the thread's deadline.
    _silence: float | None = None
    _allowance: Allowance | None = None

    def settimeout(self, value: float | None) -> None:
        self._silence = value
        super().settimeout(value)  # type: ignore[misc]

    # http.client calls this once per answer and reads the answer from the result.
    def makefile(self, *args: Any, **kwargs: Any) -> Any:
        if args != ("rb",) or kwargs:
            raise ValueError(f"file of a registry's socket: wanted mode rb alone (got {args} {kwargs})")
        self._allowance = allowance = Allowance()
        return BoundedReader(super().makefile("rb", buffering=0), allowance)  # type: ignore[misc]

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        least = pace.OF_THREAD.pace
        self._shorten_timeout(None if least is None else least.end)
        size = cast("int", super().recv_into(*args, **kwargs))  # type: ignore[misc]
        if least is not None:
            least.received(size)
        allowance = self._allowance
        if allowance is not None:
            allowance.left -= size
            if allowance.left < 0:
                allowance.refuse()
        return size

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        least = pace.OF_THREAD.pace
        if least is not None:
            least.sent()
        self._shorten_timeout()
        super().sendall(*args, **kwargs)  # type: ignore[misc]

    def _shorten_timeout(self, end: float | None = None) -> None:
        exchange = interrupt.OF_THREAD.exchange
        if exchange is not None and (cast("object", exchange.socket) is not self or exchange.broken_off):
            exchange.use(cast("socket.socket", self))
        deadline = IN_FORCE.deadline
        if deadline is None or (end is not None and end < deadline):
            deadline = end
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


class _DialingMixin:
    # Connects by name and deadline, or to the unix socket.
    dialer: Dialer
    unix_socket: Path | None

    def _new_conn(self) -> socket.socket:
        this = cast("HTTPConnection", self)
        seconds = cast("float", this.timeout)
        try:
            connection = self._dial(time.monotonic() + seconds)
        except (socket.gaierror, UnicodeError) as error:
            raise NewConnectionError(this, f"cannot resolve {this.host} ({_words(error)})") from error
        except TimeoutError as error:
            raise NewConnectionError(this, f"cannot connect to {this.host}:{this.port} ({error})") from error
        except OSError as error:
            where = self.unix_socket or f"{this.host}:{this.port}"
            raise NewConnectionError(this, f"cannot connect to {where} ({_words(error)})") from error
        connection.settimeout(seconds)
        return connection

    def _dial(self, deadline: float) -> socket.socket:
        this = cast("HTTPConnection", self)
        if self.unix_socket is None:
            outer = IN_FORCE.deadline
            deadline = deadline if outer is None else min(deadline, outer)
            return self.dialer.dial(this.host, this.port, deadline, this.socket_options or ())
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.0, deadline - time.monotonic()))
            connection.connect(str(self.unix_socket))
        except BaseException:
            connection.close()
            raise
        return connection


class _PlainConnection(_DialingMixin, HTTPConnection):
    def _new_conn(self) -> socket.socket:
        plain = super()._new_conn()
        ours = _DeadlineSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())
        ours.settimeout(cast("float", self.timeout))
        return ours


class _TLSConnection(_DialingMixin, HTTPSConnection):
    pass


class _TLSPool(HTTPSConnectionPool):
    def _validate_conn(self, conn: Any) -> None:
        # urllib3 would also warn of an unverified certificate at each connection; our log does so once.
        if conn.is_closed:
            conn.connect()


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _count_failure() -> None:
    if is_broken_off():  # another request was faster
        REGISTRY_REQUESTS.add(label="broken_off")
        return
    REGISTRY_REQUESTS.add(label="failed")
    REGISTRY_FAILED.now()
