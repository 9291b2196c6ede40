"""Connecting to a host by name, in time: the resolver may be silent, and an address may swallow packets.

getaddrinfo has no time-out, so it runs in its own thread. Addresses are tried in order, the next one when an attempt
fails or has been silent for 250 ms, and the first to connect wins (RFC 8305, "Happy Eyeballs").
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from obdlab.call import BrokenOffError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from obdlab.call import Call

Address = tuple[socket.AddressFamily, Any]
SocketOption = tuple[int, int, int | bytes]

#: "Connection Attempt Delay" of RFC 8305.
ATTEMPT_DELAY_S = 0.25
_LONGEST_S = 60.0
# Longest wait for a resolver if earlier addresses of the name are known.
_PATIENCE_S = 2.0
_MOST_ADDRESSES = 16
# How often an attempt checks if it is still wanted.
_LOOK_UP_S = 0.05
_MOST_NAMES = 1024
_FINAL_ERRORS = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


@dataclass(slots=True)
class _Query:
    done: threading.Event = field(default_factory=threading.Event)
    addresses: list[Address] = field(default_factory=list)
    error: OSError | UnicodeError | None = None


class Dialer:
    """Opens TCP connections. Thread-safe; keeps the addresses of names, for times when the resolver is down."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queries: dict[tuple[str, int], _Query] = {}
        self._known: dict[tuple[str, int], list[Address]] = {}

    def dial(self, host: str, port: int, call: Call, options: Iterable[SocketOption] = ()) -> socket.socket:
        """Return a connected socket without time-out, by the deadline of the ``call``, 60 s without one.

        ``options`` (level, name, value) are set before it connects. Raises BrokenOffError,
        socket.gaierror if the name has no address, TimeoutError at the deadline, OSError naming each address that
        refused.
        """
        call = call.until(time.monotonic() + _LONGEST_S)
        addresses = self.resolve(host, port, call)
        connection, address = _connect(addresses, call, tuple(options))
        if address != addresses[0]:  # earlier ones failed or were slow: begin with this one next time
            with self._lock:
                self._known[host, port] = [address, *(each for each in addresses if each != address)]
        return connection

    def resolve(self, host: str, port: int, call: Call) -> list[Address]:
        """Return the addresses of a name, in the order in which to try them."""
        try:
            return _lookup(host, port, socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):
            pass  # not a literal address
        key = (host, port)
        with self._lock:
            known = self._known.get(key)
            query = self._queries.get(key)
            if query is None:
                query = self._queries[key] = _Query()
                threading.Thread(target=self._ask, args=(key, query), name="obdlab-dns", daemon=True).start()
        answered = query.done.wait(call.left_s(_LONGEST_S if known is None else _PATIENCE_S))
        if query.addresses:
            return _favour(query.addresses, known)
        final = isinstance(query.error, UnicodeError) or getattr(query.error, "errno", None) in _FINAL_ERRORS
        if known is not None and not final:
            return known
        if not answered:
            raise TimeoutError(f"no answer from the resolver in time for {host}")
        if isinstance(query.error, UnicodeError):
            raise socket.gaierror(socket.EAI_NONAME, "not a host name")
        raise query.error or socket.gaierror(socket.EAI_NONAME, "no address")

    def _ask(self, key: tuple[str, int], query: _Query) -> None:
        try:
            query.addresses = _lookup(*key)
        except (OSError, UnicodeError) as error:
            query.error = error
        finally:
            with self._lock:
                self._queries.pop(key, None)
                if query.addresses:
                    if len(self._known) >= _MOST_NAMES:
                        self._known.clear()
                    self._known[key] = _favour(query.addresses, self._known.get(key))
            query.done.set()


def _lookup(host: str, port: int, flags: int = 0) -> list[Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return _interleaved([(family, address) for family, _, _, _, address in found])[:_MOST_ADDRESSES]


# Alternates between address families, beginning with that of the first address: one family may be without a route.
def _interleaved(addresses: Sequence[Address]) -> list[Address]:
    first = [each for each in addresses if each[0] == addresses[0][0]]
    other = [each for each in addresses if each[0] != addresses[0][0]]
    result: list[Address] = []
    for number in range(max(len(first), len(other))):
        result += first[number : number + 1] + other[number : number + 1]
    return result


# Puts the address that worked last first, if the name still has it.
def _favour(addresses: list[Address], known: list[Address] | None) -> list[Address]:
    if not known or known[0] not in addresses:
        return addresses
    return [known[0], *(each for each in addresses if each != known[0])]


def _connect(
    addresses: Sequence[Address], call: Call, options: Sequence[SocketOption]
) -> tuple[socket.socket, Address]:
    waiting = deque(addresses)
    failures: list[str] = []
    deadline = time.monotonic() + call.left_s(_LONGEST_S)
    with ExitStack() as attempts, selectors.PollSelector() as selector:
        next_start = 0.0
        while waiting or selector.get_map():
            now = time.monotonic()
            if call.broken_off:
                raise BrokenOffError("broken off")
            if now >= deadline:
                tried = ", ".join(str(key.data[1][0]) for key in selector.get_map().values())
                raise TimeoutError("; ".join([*failures, f"no answer in time from {tried or 'any address'}"]))
            if waiting and (now >= next_start or not selector.get_map()):
                next_start = now + ATTEMPT_DELAY_S
                address = waiting.popleft()
                failure = _start(address, options, attempts, selector)
                if failure:
                    failures.append(failure)
                continue
            until = min(deadline, next_start) if waiting else deadline
            for key, _ in selector.select(min(until - now, _LOOK_UP_S)):
                connection: socket.socket = key.fileobj  # type: ignore[assignment]
                code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                selector.unregister(connection)
                if code == 0:
                    # The exit stack closes the other attempts.
                    winner = socket.socket(fileno=connection.detach())
                    winner.setblocking(True)
                    return winner, key.data
                failures.append(f"{key.data[1][0]}: {os.strerror(code)}")
                next_start = now
    raise ConnectionError("; ".join(failures))


def _start(
    address: Address,
    options: Sequence[SocketOption],
    attempts: ExitStack,
    selector: selectors.BaseSelector,
) -> str | None:
    # Returns the reason why the attempt could not begin, or None.
    family, place = address
    try:
        connection = attempts.enter_context(socket.socket(family, socket.SOCK_STREAM))
        connection.setblocking(False)
        for option in options:
            connection.setsockopt(*option)
        code = connection.connect_ex(place)
    except OSError as error:
        return f"{place[0]}: {error.strerror or error}"
    if code not in (0, errno.EINPROGRESS):
        return f"{place[0]}: {os.strerror(code)}"
    selector.register(connection, selectors.EVENT_WRITE, address)
    return None
