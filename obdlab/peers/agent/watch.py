"""Requests to other agents under observation: those of a dead, silent or slow agent are broken off in time.

An agent that is silent may be dead, or wait for another one above it. After a moment of silence it is asked whether
it is alive, and whether the bytes are on their way to it. A dead or stopped one costs about a second; one that waits
for a slow registry or a busy link gets more time, as all that wait below it would otherwise ask the registry too.
"""

from __future__ import annotations

import logging
import threading
import time
from enum import Enum, auto
from typing import TYPE_CHECKING, Self

from obdlab.call import Call
from obdlab.registry.dial import Dialer
from obdlab.registry.tries import SocketCancellation

if TYPE_CHECKING:
    from obdlab.peers.agent.members import Member

logger = logging.getLogger(__name__)

#: Path at which an agent answers at once.
ALIVE_PATH = "/alive"
#: Header of the answer if the bytes are on their way to that agent.
WAITS_HEADER = "X-Obdlab-Waits"
#: Longest silence of an agent that is alive, without and with bytes on their way to it.
SILENCE_S, LONGEST_SILENCE_S = 1.5, 8.0
#: Least bytes per second of a transfer, from a second after its first byte on.
LEAST_RATE = 32 << 10

_TICK_S = 0.05
# On a link that is full a connection may lose its first packet, which is sent again after a second.
_PROBES_S = (0.35, 0.45)
_RATED_AFTER_S = 1.0
# An agent's answer to a probe has some 150 bytes.
_MOST_ANSWER = 4096
_END = b"\r\n\r\n"
_dialer = Dialer()


class Attempt:
    """One request to an agent, from its beginning to its last byte. Use it in a ``with`` block."""

    def __init__(self, watch: Watch, member: Member, digest: str, offset: int, patience_s: float) -> None:
        self.member = member
        self.digest, self.offset = digest, offset
        self.patience_s = patience_s
        self.cancellation = SocketCancellation()
        self.progressed = time.monotonic()
        self.received = 0
        #: When the agent last said that the bytes are on their way to it.
        self.confirmed = 0.0
        #: Why the request was broken off: "dead", "silent", "slow" or "".
        self.why = ""
        self._first_byte: float | None = None
        self._watch = watch

    def __enter__(self) -> Self:
        self._watch.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.remove(self)

    def progress(self, received: int) -> None:
        """Count received bytes."""
        self.progressed = time.monotonic()
        self.received += received
        if self._first_byte is None and received:
            self._first_byte = self.progressed

    def break_off(self, why: str) -> None:
        """End the request's wait now."""
        self.why = self.why or why
        self.cancellation.break_off()

    @property
    def is_slow(self) -> bool:
        """True if bytes come, and too few."""
        elapsed = 0.0 if self._first_byte is None else time.monotonic() - self._first_byte
        return elapsed > _RATED_AFTER_S and self.received < LEAST_RATE * elapsed

    def is_silent(self, now: float) -> bool:
        """Return True if no bytes have come for too long."""
        silence_s = now - self.progressed
        return silence_s > LONGEST_SILENCE_S or (silence_s > SILENCE_S and now - self.confirmed > SILENCE_S)


class Watch:
    """Watches attempts from one thread, which runs until :meth:`close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attempts: set[Attempt] = set()
        self._probed: set[Attempt] = set()
        self._closing = threading.Event()
        threading.Thread(target=self._run, name="obdlab-peer-watch", daemon=True).start()

    def add(self, attempt: Attempt) -> None:
        """Begin to watch."""
        with self._lock:
            self._attempts.add(attempt)

    def remove(self, attempt: Attempt) -> None:
        """Watch no longer."""
        with self._lock:
            self._attempts.discard(attempt)

    def close(self) -> None:
        """End the thread."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(_TICK_S):
            now = time.monotonic()
            with self._lock:
                attempts = list(self._attempts)
            for attempt in attempts:
                if attempt.is_slow:
                    attempt.break_off("slow")
                elif attempt.is_silent(now):
                    attempt.break_off("silent")
                elif now - max(attempt.progressed, attempt.confirmed) > attempt.patience_s:
                    self._look_at(attempt)

    def _look_at(self, attempt: Attempt) -> None:
        with self._lock:
            if attempt in self._probed:
                return
            self._probed.add(attempt)
        try:
            threading.Thread(target=self._probe, args=(attempt,), name="obdlab-peer-probe", daemon=True).start()
        except RuntimeError:  # no thread available: the longest silence ends the wait
            with self._lock:
                self._probed.discard(attempt)

    def _probe(self, attempt: Attempt) -> None:
        state = look(attempt.member.address, attempt.digest, attempt.offset)
        now = time.monotonic()
        if state is State.WAITS:
            attempt.confirmed = now
        with self._lock:
            self._probed.discard(attempt)
            # Also those to the same agent that have waited as long: one question will do.
            dead = [
                each
                for each in self._attempts
                if state is State.DEAD and each.member == attempt.member and each.progressed <= attempt.progressed
            ]
        for each in dead:
            each.break_off("dead")


class State(Enum):
    """An agent's state, seen from outside."""

    DEAD = auto()
    ALIVE = auto()
    #: Alive, and the bytes are on their way to it.
    WAITS = auto()


def look(address: str, digest: str = "", offset: int = 0) -> State:
    """Ask the agent at ``host:port`` whether it is alive and waits for a blob's bytes at ``offset``."""
    target = f"{ALIVE_PATH}?digest={digest}&offset={offset}" if digest else ALIVE_PATH
    for timeout_s in _PROBES_S:
        try:
            status, *headers = _answer(address, target, Call(time.monotonic() + timeout_s)).split(b"\r\n")
        except OSError as error:
            logger.debug("%s: no answer: %s", address, error)
            continue
        if status.split()[1:2] == [b"204"]:
            named = (line.partition(b":") for line in headers)
            waits = any(name.lower() == WAITS_HEADER.lower().encode() and value.strip() for name, _, value in named)
            return State.WAITS if waits else State.ALIVE
    return State.DEAD


# Returns the status line and the headers. The time-out of http.client is for each wait: an agent that sends a byte
# now and then would hold the thread for ever.
def _answer(address: str, target: str, call: Call) -> bytes:
    host, _, port = address.rpartition(":")
    with _dialer.dial(host.strip("[]"), int(port), call) as connection:
        connection.settimeout(max(call.left_s(1.0), 0.001))
        connection.sendall(f"GET {target} HTTP/1.0\r\n\r\n".encode())
        data = b""
        while _END not in data:
            left_s = call.left_s(1.0)
            if left_s <= 0:
                raise TimeoutError("no whole answer in time")
            connection.settimeout(left_s)
            piece = connection.recv(_MOST_ANSWER - len(data))
            if not piece:
                raise ConnectionError("answer without an end")
            data += piece
    return data.partition(_END)[0]


def is_alive(address: str) -> bool:
    """Return True if an agent answers at ``host:port``."""
    return look(address) is not State.DEAD
