"""The tries of a request: another one when a try fails, and a second request for a range when the first one lags.

Of two requests the first answer wins, and the other is broken off. A request lags if it takes longer than 95 of 100
similar ones before it (Dean and Barroso, "The Tail at Scale", 2013). The first request stays in the calling thread:
requests in time cost only a note; one thread of the process watches them all.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from obdlab.call import BrokenOffError, Call
from obdlab.observe.counters import REGISTRY_RETRIES, Counter
from obdlab.registry.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Second requests by outcome: "sent" counts all, "won" those with the first answer.
HEDGES = Counter("registry_hedges")

#: Larger ranges are not hedged: they are streams, and would cost as much again. A miss fetches up to two extents.
LARGEST = 2 << 20
#: At most this share of requests is sent twice, beside a few to begin with.
SHARE = 0.05
_BURST = 4.0
# A shorter lag is not worth a request; without samples the lag is a whole second.
_LEAST_LAG_S = 0.02
_FIRST_LAG_S = 1.0
_QUANTILE = 0.95
_SAMPLES = 64
_LEAST_SAMPLES = 16
_RENEW_EVERY = 8
_MOST_KEYS = 256
_TICK_S = 0.01
_IDLE_S = 10.0
_LONGEST_S = 600.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0
_LONGEST_RETRY_AFTER_S = 60.0
_LEAST_TRY_S = 1.0
#: Least bytes in each window of an answer. At 100 kbit/s a window has 61 KiB; one of fifteen connections gets 4.
WINDOW_S = 5.0
LEAST_IN_WINDOW = 4 << 10


class WindowPace:
    """A least speed for answers, so that a slow connection costs seconds, not half of a read's deadline.

    A server that drips is never silent for long, and a connection that loses packets stalls: another connection is
    likely to be faster. If the whole link is slow, another connection does not help. So the least speed is low, and
    only a few tries must keep it. A request, and every LEAST_IN_WINDOW bytes, begin
    another window.
    """

    __slots__ = ("_received", "end")

    def __init__(self) -> None:
        self.end: float | None = None
        self._received = 0

    def received(self, size: int) -> None:
        """Count received bytes."""
        self._received += size
        if self.end is None or self._received >= LEAST_IN_WINDOW:
            self.end, self._received = time.monotonic() + WINDOW_S, 0


class SocketCancellation:
    """Breaks off a call's exchange with a registry from another thread."""

    __slots__ = ("_lock", "_socket", "broken_off")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.broken_off = False

    def break_off(self) -> None:
        """Make the call's current wait fail now, and all that follow."""
        with self._lock:
            self.broken_off = True
            if self._socket is None:
                return
            try:
                # Not SSLSocket's own shutdown: that would remove the TLS state under the thread that uses it.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            except OSError:
                pass  # closed, or not connected yet

    def use(self, used: socket.socket | None) -> None:
        """Set the socket that the call waits for; None when it may serve another call. Raises BrokenOffError."""
        with self._lock:
            if self.broken_off and used is not None:
                raise BrokenOffError("broken off")
            self._socket = used


def persist(
    attempt: Callable[[Call], T],
    call: Call,
    *,
    blob: str,
    offset: int | None = None,
    tries: int | None = None,
    halving: bool = False,
    paced: int = 0,
) -> T:
    """Call ``attempt`` until it succeeds, fails permanently, the call's deadline comes or ``tries`` are used up.

    ``attempt`` gets the terms of the try. With ``halving``, its deadline leaves half of the time that is left to the
    next try; the last second is not halved. The first ``paced`` tries must keep a least pace (:class:`WindowPace`).

    Pauses double from 50 ms to 5 s, each shortened by a random part so that many readers do not return in step; a
    registry's Retry-After is kept if the deadline allows. Raises the last RegistryError, with its place.
    """
    deadline = math.inf if call.deadline is None else call.deadline
    tried = 0
    pause = _FIRST_PAUSE_S
    before: RegistryError | None = None
    while True:
        tried += 1
        end = call.deadline
        if halving and math.inf > deadline - (now := time.monotonic()) >= 2 * _LEAST_TRY_S:
            end = now + (deadline - now) / 2
        terms = Call(end, None, WindowPace() if tried <= paced else call.pace, call.cancellation)
        try:
            return attempt(terms)
        except RegistryError as error:
            import random  # half of all imports here, for failures alone

            delay = max(min(error.retry_after_s, _LONGEST_RETRY_AFTER_S), pause * random.uniform(0.5, 1.0))
            hopeless = not error.temporary or tried == tries or time.monotonic() + delay >= deadline
            if hopeless:
                raise error.at(blob, offset, tried, before=before) from error
            last = error
            logger.info("%s (try %d, the next in %.1f s)", error.at(blob, offset, 1), tried, delay)
        time.sleep(delay)
        if time.monotonic() >= deadline:  # a busy machine wakes late, and a try without time says nothing
            raise last.at(blob, offset, tried, before=before) from last
        REGISTRY_RETRIES.add()
        before = before if last.timed_out else last
        pause = min(2 * pause, _LONGEST_PAUSE_S)


class Hedges:
    """Runs requests with a second one in reserve. At most a ``share`` of them is sent twice; 0 turns hedging off."""

    def __init__(self, share: float = SHARE) -> None:
        self._share = share
        self._lock = threading.Lock()
        self._tokens = _BURST if share else 0.0
        self._lags: dict[Hashable, _Lag] = {}

    def run(self, key: Hashable, request: Callable[[Call], T], call: Call) -> T:
        """Return the result of ``request``, which may run twice at once; similar requests share a ``key``.

        ``request`` gets the terms of the call, and a cancellation of its own. Raises the RegistryError of the first
        one if none succeeds.
        """
        if not self._share:
            return request(call)
        lag = self._lags.get(key) or self._lag_of(key)
        race = _Race(request, call, self._take)
        started = time.monotonic()
        _watch.add(started + lag.seconds, race)
        try:
            result = request(Call(call.deadline, None, call.pace, race.first))
        except RegistryError as error:
            result = race.result_of_second(error)
        finally:
            race.end()
        lag.add(time.monotonic() - started)
        with self._lock:
            self._tokens = min(_BURST, self._tokens + self._share)
        return result

    def _lag_of(self, key: Hashable) -> _Lag:
        with self._lock:
            if len(self._lags) >= _MOST_KEYS:
                self._lags.clear()
            return self._lags.setdefault(key, _Lag())

    def _take(self) -> bool:
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


class _Lag:
    # Durations of the latest requests, and the time after which a request lags.
    __slots__ = ("_count", "_taken", "seconds")

    def __init__(self) -> None:
        self._taken: deque[float] = deque(maxlen=_SAMPLES)
        self._count = 0
        self.seconds = _FIRST_LAG_S

    def add(self, seconds: float) -> None:
        # Threads may add at the same time. A renewal that is lost this way is made up by the next.
        self._taken.append(seconds)
        self._count += 1
        if self._count % _RENEW_EVERY == 0 and len(self._taken) >= _LEAST_SAMPLES:
            ordered = sorted(self._taken.copy())
            self.seconds = max(_LEAST_LAG_S, ordered[int(len(ordered) * _QUANTILE)])


class _Race(Generic[T]):
    __slots__ = (
        "_call",
        "_error",
        "_finished",
        "_lock",
        "_request",
        "_result",
        "_second",
        "_take",
        "first",
        "over",
    )

    def __init__(self, request: Callable[[Call], T], call: Call, take: Callable[[], bool]) -> None:
        self._request = request
        self._take = take
        self._call = call
        self._lock = threading.Lock()
        self.first = SocketCancellation()
        self._second: SocketCancellation | None = None
        self._finished: threading.Event | None = None
        self._result: list[T] = []
        #: True when the caller has stopped waiting.
        self.over = False

    def end(self) -> None:
        # The caller waits no longer.
        with self._lock:
            self.over = True
            second = self._second
        if second is not None and not self._result:
            second.break_off()

    def result_of_second(self, error: RegistryError) -> T:
        # After the first request has failed with this error, which is raised if the second one fails, too.
        with self._lock:
            finished = self._finished
            self.over = finished is None
        if finished is not None:
            finished.wait(self._call.left_s(_LONGEST_S))
        if self._result:
            return self._result[0]
        raise error

    def lags(self) -> None:
        # Called by the watch thread.
        with self._lock:
            if self.over or not self._take():
                return
            self._second = SocketCancellation()
            self._finished = threading.Event()
        try:
            threading.Thread(target=self._run_second, name="obdlab-hedge", daemon=True).start()
        except RuntimeError:  # no thread available
            self._finished.set()
            return
        HEDGES.add(label="sent")

    def _run_second(self) -> None:
        second, finished = self._second, self._finished
        if second is None or finished is None:
            raise RuntimeError("second request without a race")
        try:
            call = self._call
            deadline = time.monotonic() + _IDLE_S if call.deadline is None else call.deadline
            result = self._request(Call(deadline, None, call.pace and WindowPace(), second))
            with self._lock:
                won = not self.over
                if won:
                    self._result.append(result)
            if won:
                HEDGES.add(label="won")
                self.first.break_off()
        except RegistryError as error:
            if not second.broken_off:
                logger.debug("second request failed: %s", error)
        finally:
            finished.set()


class _Watch:
    # Calls lags() of races that lag, accurate to 10 ms. Its thread ends after a while without races.
    _thread: threading.Thread | None
    _asleep: bool

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def add(self, when: float, race: _Race[Any]) -> None:
        with self._lock:
            self._waiting.append((when, race))
            if self._thread is None:
                self._start()
            elif self._asleep:
                self._asleep = False
                self._wake.set()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="obdlab-hedges", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread available: nothing is hedged
            self._waiting.clear()
            return
        self._thread = thread

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._waiting: list[tuple[float, _Race[Any]]] = []
        self._thread = None
        self._asleep = False

    def _run(self) -> None:
        while True:
            now = time.monotonic()
            with self._lock:
                due = [race for when, race in self._waiting if when <= now and not race.over]
                self._waiting = [entry for entry in self._waiting if entry[0] > now and not entry[1].over]
                self._asleep = not self._waiting
                self._wake.clear()
            for race in due:
                race.lags()
            if not self._asleep:
                time.sleep(_TICK_S)
            elif not self._wake.wait(_IDLE_S):
                with self._lock:
                    if self._asleep:  # no race was added meanwhile
                        self._thread = None
                        return


_watch = _Watch()
