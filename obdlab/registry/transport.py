"""HTTP exchanges over kept connections, each under a deadline that a dripping server cannot stretch.

A time-out of a socket counts silence: a server that sends one byte a second never trips it. Here every operation of a
socket waits at most until the deadline of the call that uses it (:class:`obdlab.call.Call`).
"""

from __future__ import annotations

import http.client
import select
import socket
import ssl
import threading
import time
from collections import OrderedDict
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import quote, urlsplit

from obdlab.call import UNBOUND
from obdlab.observe.counters import REGISTRY_ANSWERED, REGISTRY_FAILED, REGISTRY_REQUESTS
from obdlab.registry.answer import Allowance, Answer, BoundedReader
from obdlab.registry.dial import Dialer
from obdlab.registry.errors import RegistryError
from obdlab.registry.failures import TRANSPORT_ERRORS, ConnectError, from_exception
from obdlab.registry.tls import HostTLS, TLSOptions, make_context, tls_of_host

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import IO

    from obdlab.call import Call

_HOSTS_KEPT = 32
# As many as a device has threads waiting for a registry: a further one would be opened again for each request.
_CONNECTIONS_PER_HOST = 64
# 16 KiB, the default of http.client is 8, costs a syscall and a TLS record set-up more often than needed.
_SEND_BLOCK = 128 << 10
_NO_DELAY = ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),)
_PORTS = {"http": 80, "https": 443}
# Reserved characters and escapes stay as they are; others must be escaped (RFC 3986 section 2).
_PLAIN = "%:/?#[]@!$&'()*+,;=~"
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

# Host, port, and True for TLS.
_Place = tuple[str, int, bool]


class _Target(NamedTuple):
    place: _Place
    path: str


@lru_cache(1024)
def _target(url: str) -> _Target:
    # Raises ValueError.
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError("not an HTTP URL with a host")
    port = parts.port or _PORTS[parts.scheme]
    path = quote(parts.path or "/", safe=_PLAIN) + (f"?{quote(parts.query, safe=_PLAIN)}" if parts.query else "")
    return _Target((parts.hostname, port, parts.scheme == "https"), path)


class Transport:
    """Sends requests over kept connections. Thread-safe. The caller handles redirects.

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
        self._headers = {"User-Agent": user_agent, "Accept-Encoding": "identity"}
        self._tls_options = tls or TLSOptions()
        self._unix_socket = unix_socket
        self._lock = threading.Lock()
        self._dialer = Dialer()
        self._hosts: OrderedDict[_Place, _Host] = OrderedDict()
        # By TLS options, since contexts are costly: tens of ms and some MiB with the system's CAs.
        self._contexts: dict[HostTLS, ssl.SSLContext] = {}
        self._contexts_by_host: dict[str, ssl.SSLContext] = {}

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        doing: str,
        call: Call = UNBOUND,
        body: bytes | IO[bytes] | None = None,
        http_proxy: str = "",
        authorization: str | None = None,
    ) -> Answer:
        """Return the answer with its body unread, to be read on the same terms; the caller closes it.

        ``http_proxy``, "http://host:port", gets the request in place of the URL's host. ``authorization`` is the
        header of that name.
        Raises RegistryError, temporary unless the URL or a certificate is wrong.
        """
        if call.deadline is not None and call.deadline <= time.monotonic():
            raise RegistryError(f"{doing}: no answer in time: deadline passed", temporary=True, timed_out=True)
        headers = {**self._headers, **headers}
        if authorization is not None:
            headers["Authorization"] = authorization
        try:
            target = _target(url)
            if http_proxy:
                place, path = _target(http_proxy).place, url  # a proxy needs the whole URL
            else:
                place, path = target
            host = self._hosts.get(place) or self._host(place, http_proxy or url)
            raw = None
            connection = host.take() or _Connection(place, host, self._dialer, self._unix_socket)
            try:
                connection.begin(call, self._silence_s)
                if call.cancellation is not None and connection.wire is not None:
                    call.cancellation.use(connection.wire)
                try:
                    connection.request(method, path, body, headers)
                except BrokenPipeError:
                    pass  # a server that refuses a body may answer before it has read all of it
                raw = connection.getresponse()
                answer = Answer(raw, connection)
            except BaseException:
                if raw is not None:
                    raw.close()
                connection.close()
                raise
        except (*TRANSPORT_ERRORS, ValueError) as error:  # ValueError: a URL or header that cannot be sent
            _count_failure(call)
            refusal = _tls_refusal(error)
            if refusal is None:
                raise from_exception(error, doing) from error
            self._look_again(url)
            raise RegistryError(f"{doing}: {_netloc(url)}: {refusal}") from error
        REGISTRY_REQUESTS.add(label=str(answer.status))
        (REGISTRY_FAILED if answer.status >= 500 else REGISTRY_ANSWERED).now()
        return answer

    def close(self) -> None:
        """Close idle connections; connections in use are closed when they are given back."""
        with self._lock:
            hosts = list(self._hosts.values())
            self._hosts.clear()
        for host in hosts:
            host.close()

    def _host(self, place: _Place, url: str) -> _Host:
        context = self._context(url) if place[2] else None
        with self._lock:
            host = self._hosts.setdefault(place, _Host(context))
            self._hosts.move_to_end(place)
            dropped = [self._hosts.popitem(last=False)[1]] if len(self._hosts) > _HOSTS_KEPT else []
        for other in dropped:
            other.close()
        return host

    def _context(self, url: str) -> ssl.SSLContext:
        netloc = _netloc(url)
        with self._lock:
            context = self._contexts_by_host.get(netloc)
            if context is None:
                tls = tls_of_host(self._tls_options, netloc)
                context = self._contexts.get(tls)
                if context is None:
                    context = self._contexts[tls] = make_context(tls)
                    context.set_alpn_protocols(["http/1.1"])
                    context.sslsocket_class = _DeadlineTLSSocket
                if len(self._contexts_by_host) >= _MOST_HOSTS:
                    self._contexts_by_host.clear()
                self._contexts_by_host[netloc] = context
            return context

    # After a refused certificate its files are read again: they may have been renewed since.
    def _look_again(self, url: str) -> None:
        with self._lock:
            context = self._contexts_by_host.pop(_netloc(url), None)
            if context is None:
                return
            for key in [key for key, other in self._contexts.items() if other is context]:
                del self._contexts[key]
            places = [place for place, host in self._hosts.items() if host.context is context]
            hosts = [self._hosts.pop(place) for place in places]
        for host in hosts:
            host.close()


class _Host:
    # The idle connections to one place, the last used one last.
    __slots__ = ("closed", "context", "idle", "lock")

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self.context = context
        self.lock = threading.Lock()
        self.idle: list[_Connection] = []
        self.closed = False

    def take(self) -> _Connection | None:
        while self.idle:
            with self.lock:
                connection = self.idle.pop() if self.idle else None
            if connection is None:
                break
            if not connection.dropped():
                connection.home = self
                return connection
            connection.close()
        return None

    # For a client that was never closed. Idle connections do not refer to it, so this runs before they are collected.
    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        with self.lock:
            self.closed = True
            idle, self.idle = self.idle, []
        for connection in idle:
            connection.close()


def _netloc(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2].lower()


def _tls_refusal(error: Exception) -> str | None:
    # Returns the meaning of a permanent TLS failure; None for any other failure.
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS certificate refused: {error.verify_message.rstrip('.')}"
    if not isinstance(error, ssl.SSLError) or not error.reason:
        return None
    if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        return "does not speak TLS (plain HTTP is spoken only where asked for)"
    if error.reason.endswith(_FINAL_TLS_REASONS):
        return f"TLS refused: {error.reason.lower().replace('_', ' ')}"
    return None


class _DeadlineMixin:
    # Shortens the time-out of each operation of a socket to the time left until the deadline of its call.
    call: Call = UNBOUND
    silence_s = 0.0
    _allowance: Allowance | None = None

    # http.client calls this once per answer and reads the answer from the result.
    def makefile(self, *args: Any, **kwargs: Any) -> Any:
        if args != ("rb",) or kwargs:
            raise ValueError(f"file of a registry's socket: wanted mode rb alone (got {args} {kwargs})")
        self._allowance = allowance = Allowance()
        return BoundedReader(super().makefile("rb", buffering=0), allowance)  # type: ignore[misc]

    # Each of both computes the time-out by itself: a miss has three such operations, and each call costs.
    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        call = self.call
        pace, end = call.pace, call.deadline
        if pace is not None and pace.end is not None and (end is None or pace.end < end):
            end = pace.end
        left_s = self.silence_s if end is None else min(self.silence_s, end - time.monotonic())
        if left_s <= 0:
            raise TimeoutError("deadline passed")
        super().settimeout(left_s)  # type: ignore[misc]
        size = cast("int", super().recv_into(*args, **kwargs))  # type: ignore[misc]
        if pace is not None:
            pace.received(size)
        allowance = self._allowance
        if allowance is not None:
            allowance.left -= size
            if allowance.left < 0:
                allowance.refuse()
        return size

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        call = self.call
        if call.pace is not None:
            call.pace.end = None
        end = call.deadline
        left_s = self.silence_s if end is None else min(self.silence_s, end - time.monotonic())
        if left_s <= 0:
            raise TimeoutError("deadline passed")
        super().settimeout(left_s)  # type: ignore[misc]
        super().sendall(*args, **kwargs)  # type: ignore[misc]


class _DeadlineSocket(_DeadlineMixin, socket.socket):
    pass


class _DeadlineTLSSocket(_DeadlineMixin, ssl.SSLSocket):
    pass


class _Connection(http.client.HTTPConnection):
    # A connection that dials by name and deadline, or to a unix socket.

    def __init__(self, place: _Place, host: _Host, dialer: Dialer, unix_socket: Path | None) -> None:
        name, port, tls = place
        super().__init__(name, port, blocksize=_SEND_BLOCK)
        self.default_port = _PORTS["https" if tls else "http"]  # it is not in the Host header
        #: None while the connection is idle.
        self.home: _Host | None = host
        self._dialer = dialer
        self._unix_socket = None if tls else unix_socket
        self.wire: _DeadlineSocket | _DeadlineTLSSocket | None = None
        self._call = UNBOUND
        self._silence_s = 0.0

    @property
    def call(self) -> Call:
        return self._call

    @call.setter
    def call(self, call: Call) -> None:
        self._call = call
        if self.wire is not None:
            self.wire.call = call

    def begin(self, call: Call, silence_s: float) -> None:
        # Serves a call from now on.
        self._call, self._silence_s = call, silence_s
        if self.wire is not None:
            self.wire.call = call

    def keep(self) -> None:
        if self._call.cancellation is not None:
            self._call.cancellation.use(None)  # before another call uses the connection
        home, self.home = self.home, None
        if home is None:
            return
        with home.lock:
            kept = not home.closed and len(home.idle) < _CONNECTIONS_PER_HOST
            if kept:
                home.idle.append(self)
        if not kept:
            self.close()

    def dropped(self) -> bool:
        # An idle connection with anything to read was closed by the server, or holds bytes without a request.
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    def connect(self) -> None:
        call, silence_s = self._call, self._silence_s
        # The TLS handshake gets the connect time once more.
        seconds = min(silence_s, call.left_s(2 * silence_s) / 2)
        try:
            plain = self._dial(call, time.monotonic() + seconds)
        except (socket.gaierror, UnicodeError) as error:
            raise ConnectError(f"cannot resolve {self.host} ({_words(error)})") from error
        except TimeoutError as error:
            raise ConnectError(f"cannot connect to {self.host}:{self.port} ({error})") from error
        except OSError as error:
            where = self._unix_socket or f"{self.host}:{self.port}"
            raise ConnectError(f"cannot connect to {where} ({_words(error)})") from error
        wire: _DeadlineSocket | _DeadlineTLSSocket
        context = None if self.home is None else self.home.context
        if context is None:
            wire = _DeadlineSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())
        else:
            plain.settimeout(seconds)
            try:
                name = self.host.rstrip(".").partition("%")[0]  # without the zone of an IPv6 address
                wire = cast("_DeadlineTLSSocket", context.wrap_socket(plain, server_hostname=name))
            except BaseException:
                plain.close()
                raise
        wire.call, wire.silence_s = call, silence_s
        self.sock = self.wire = wire
        if call.cancellation is not None:
            call.cancellation.use(wire)

    def _dial(self, call: Call, deadline: float) -> socket.socket:
        if self._unix_socket is None:
            return self._dialer.dial(self.host, self.port, call.until(deadline), _NO_DELAY)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.0, deadline - time.monotonic()))
            connection.connect(str(self._unix_socket))
        except BaseException:
            connection.close()
            raise
        return connection


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _count_failure(call: Call) -> None:
    if call.broken_off:  # another request was faster
        REGISTRY_REQUESTS.add(label="broken_off")
        return
    REGISTRY_REQUESTS.add(label="failed")
    REGISTRY_FAILED.now()
