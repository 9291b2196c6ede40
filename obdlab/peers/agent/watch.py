"""Requests to other agents under observation: those of a dead, silent or slow agent are broken off in time.

An agent that is silent may be dead, or wait for another one above it. After a moment of silence it is asked whether
it is alive: a dead or stopped one costs less than a second, and one that waits for a slow registry gets more time.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
from typing import TYPE_CHECKING, Self

from obdlab.registry.tries import SocketCancellation

if TYPE_CHECKING:
    from obdlab.peers.agent.members import Member

logger = logging.getLogger(__name__)

#: Path at which an agent answers at once.
ALIVE_PATH = "/alive"
#: Longest silence of an agent that is alive.
LONGEST_SILENCE_S = 1.5
#: Least bytes per second of a transfer after its first second.
LEAST_RATE = 64 << 10

_TICK_S = 0.05
_PROBE_S = 0.3
_RATED_AFTER_S = 1.0


class Attempt:
    """One request to an agent, from its beginning to its last byte. Use it in a ``with`` block."""

    def __init__(self, watch: Watch, member: Member, patience_s: float) -> None:
        self.member = member
        self.patience_s = patience_s
        self.cancellation = SocketCancellation()
        self.began = self.progressed = time.monotonic()
        self.received = 0
        #: Why the request was broken off: "dead", "slow" or "".
        self.why = ""
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

    def break_off(self, why: str) -> None:
        """End the request's wait now."""
        self.why = self.why or why
        self.cancellation.break_off()

    @property
    def is_slow(self) -> bool:
        """True if bytes come, and too few."""
        elapsed = time.monotonic() - self.began
        return elapsed > _RATED_AFTER_S and 0 < self.received < LEAST_RATE * elapsed


class Watch:
    """Watches attempts from one thread, which runs until :meth:`close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attempts: set[Attempt] = set()
        self._probed: set[str] = set()
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
                elif now - attempt.progressed > attempt.patience_s:
                    self._look_at(attempt.member)

    def _look_at(self, member: Member) -> None:
        with self._lock:
            if member.address in self._probed:
                return
            self._probed.add(member.address)
        try:
            threading.Thread(target=self._probe, args=(member,), name="obdlab-peer-probe", daemon=True).start()
        except RuntimeError:  # no thread available: the longest silence ends the wait
            with self._lock:
                self._probed.discard(member.address)

    def _probe(self, member: Member) -> None:
        alive = is_alive(member.address)
        with self._lock:
            self._probed.discard(member.address)
            dead = [] if alive else [each for each in self._attempts if each.member == member]
        for attempt in dead:
            attempt.break_off("dead")


def is_alive(address: str, timeout_s: float = _PROBE_S) -> bool:
    """Return True if an agent answers at ``host:port``."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_s)
    try:
        connection.request("GET", ALIVE_PATH)
        return connection.getresponse().status == http.client.NO_CONTENT
    except (OSError, http.client.HTTPException) as error:
        logger.debug("%s: not alive: %s", address, error)
        return False
    finally:
        connection.close()
