"""Flows that share the capacity of links max-min fair, without packets.

A flow crosses two links, its source's upward and its target's downward one. Its rate is as large as it can be without
taking from a flow that is no faster. After a change only those flows are rated again that can feel it: links that are
not full pass nothing on. Progress is brought up to date when a rate changes, not in between.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any

from obdlab.peers.simulator.eventqueue import SimulationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from obdlab.peers.simulator.eventqueue import Events

_NEVER = float("inf")
# Rounding must make no link full or overfull.
_ALMOST, _OVER = 1 - 1e-9, 1 + 1e-9
#: Links with more flows than this are rated again at most every so many seconds for each flow: one that n flows share
#: would otherwise cost n steps for each of n flows' ends. Until then a new flow has the room that ended ones left.
EXACT_FLOWS, PACE_S = 64, 1e-5


class Link:
    """A capacity in bytes per second, shared by the flows in ``flows``."""

    __slots__ = ("capacity", "due", "flows", "full", "load", "waiting")

    def __init__(self, capacity: float) -> None:
        if not 0 < capacity < _NEVER:
            raise SimulationError(f"link: wanted a positive capacity in bytes per second (got {capacity!r})")
        self.capacity = capacity
        self.full = capacity * _ALMOST
        self.flows: dict[Flow, None] = {}
        self.load = 0.0
        self.due = 0.0
        self.waiting = False


class Flow:
    """Bytes on their way. ``limit`` is the sender's own bound of the rate; ``sent`` is called when all are sent."""

    __slots__ = ("down", "ends", "left", "limit", "rate", "sent", "since", "up")

    def __init__(self, up: Link, down: Link, sent: Callable[[Any], None], limit: float = _NEVER) -> None:
        self.up, self.down, self.sent, self.limit = up, down, sent, limit
        self.rate = 0.0
        self.left = 0.0
        self.since = 0.0
        self.ends = _NEVER


class Network:
    """Starts, stops and rates flows. ``settle`` is to be called after the changes of one moment."""

    def __init__(self, events: Events, exact_flows: int = EXACT_FLOWS, pace_s: float = PACE_S) -> None:
        self._events = events
        self._exact, self._pace_s = exact_flows, pace_s
        self._dirty: dict[Link, None] = {}

    def start(self, flow: Flow, size: float) -> None:
        """Send ``size`` bytes by a flow that is idle."""
        flow.left, flow.since, flow.rate, flow.ends = size, self._events.now, 0.0, _NEVER
        flow.up.flows[flow] = flow.down.flows[flow] = None
        self._dirty[flow.up] = None
        if len(flow.up.flows) > self._exact:
            self._take_room(flow)

    def _take_room(self, flow: Flow) -> None:
        up, down = flow.up, flow.down
        rate = min(up.capacity - up.load, up.capacity / len(up.flows), down.capacity - down.load, flow.limit)
        if rate > up.capacity * (1 - _ALMOST):
            up.load += rate
            down.load += rate
            self._rate(flow, rate, self._events.now)

    def again(self, flow: Flow, size: float) -> None:
        """Send ``size`` more bytes at the present rate by a flow that has just ended."""
        now = self._events.now
        flow.left, flow.since, flow.ends = size, now, now + size / flow.rate
        self._events.at(flow.ends, self._end, flow)

    def stop(self, flow: Flow) -> None:
        """Take a flow off its links."""
        for link in (flow.up, flow.down):
            was_full = link.load >= link.full
            del link.flows[flow]
            if not link.flows:
                link.load = 0.0
                continue
            link.load -= flow.rate
            if was_full:
                self._dirty[link] = None
        flow.rate, flow.ends = 0.0, _NEVER

    def relimit(self, flow: Flow, limit: float) -> None:
        """Change a flow's own bound."""
        if flow.rate >= min(flow.limit, limit) * _ALMOST and flow in flow.up.flows:
            self._dirty[flow.up] = None
        flow.limit = limit

    def settle(self) -> None:
        """Rate the flows on changed links again."""
        now = self._events.now
        while self._dirty:
            link, _ = self._dirty.popitem()
            if not link.flows:
                continue
            if len(link.flows) > self._exact:
                if now < link.due:
                    if not link.waiting:
                        link.waiting = True
                        self._events.at(link.due, self._wake, link)
                    continue
                link.due = now + len(link.flows) * self._pace_s
            if not self._share_alike(link, now):
                self._share(link, now)

    def _wake(self, link: Link) -> None:
        link.waiting = False
        self._dirty[link] = None

    # The usual case: one full link, whose flows have the same rate and no other company.
    def _share_alike(self, link: Link, now: float) -> bool:
        rate = link.capacity / len(link.flows)
        for flow in link.flows:
            other = flow.down if flow.up is link else flow.up
            if len(other.flows) > 1 or rate > other.capacity * _OVER or flow.limit < rate:
                return False
        for flow in link.flows:
            other = flow.down if flow.up is link else flow.up
            other.load = rate
            self._rate(flow, rate, now)
        link.load = link.capacity
        return True

    def _share(self, first: Link, now: float) -> None:
        links = {first: None}
        while True:
            flows = _reached(links)
            rates = fill(links, flows)
            more: dict[Link, float] = {}
            for flow, rate in rates.items():
                for link in (flow.up, flow.down):
                    if link not in links:
                        more[link] = more.get(link, link.load) + rate - flow.rate
            # A link that was not full before and is overfull now bounds the rates as well.
            over = [link for link, load in more.items() if load > link.capacity * _OVER]
            if not over:
                break
            links.update(dict.fromkeys(over))
        for link, load in more.items():
            link.load = load
        for flow, rate in rates.items():
            self._rate(flow, rate, now)
        for link in links:
            link.load = sum(flow.rate for flow in link.flows)

    def _rate(self, flow: Flow, rate: float, now: float) -> None:
        if rate != flow.rate:
            flow.left = max(0.0, flow.left - flow.rate * (now - flow.since))
            flow.since, flow.rate, flow.ends = now, rate, now + flow.left / rate
            self._events.at(flow.ends, self._end, flow)

    def _end(self, flow: Flow) -> None:
        if flow.ends == self._events.now:  # else its rate has changed since
            flow.left, flow.ends = 0.0, _NEVER
            flow.sent(flow)


# The flows on ``links``, to which full links are added that these flows cross.
def _reached(links: dict[Link, None]) -> dict[Flow, None]:
    flows: dict[Flow, None] = {}
    pending = list(links)
    while pending:
        for flow in pending.pop().flows:
            if flow not in flows:
                flows[flow] = None
                for other in (flow.up, flow.down):
                    if other not in links and other.load >= other.full:
                        links[other] = None
                        pending.append(other)
    return flows


def fill(links: Iterable[Link], flows: Iterable[Flow]) -> dict[Flow, float]:
    """Return the max-min fair rates of ``flows``, which are all flows on ``links``; other links do not bound them.

    By filling: all rates grow alike; flows stop growing at their limit or as soon as one of their links is full.
    """
    left = {link: link.capacity for link in links}
    growing = {link: len(link.flows) for link in left}
    order = {link: number for number, link in enumerate(left)}
    # Levels at which links are full. They only rise while flows stop growing, so an old one is looked up again.
    levels = [(link.capacity / count, order[link], link) for link, count in growing.items() if count]
    heapify(levels)
    limited = sorted((flow for flow in flows if flow.limit < _NEVER), key=lambda flow: -flow.limit)
    rates: dict[Flow, float] = {}
    floor = 0.0

    def stop(flow: Flow, rate: float) -> None:
        rates[flow] = rate
        for link in (flow.up, flow.down):
            if link in left:
                left[link] -= rate
                growing[link] -= 1

    while levels:
        level, _, link = levels[0]
        if not growing[link]:
            heappop(levels)
            continue
        now = max(left[link] / growing[link], floor)
        if now > level * _OVER:
            heappop(levels)
            heappush(levels, (now, order[link], link))
            continue
        while limited and limited[-1] in rates:
            limited.pop()
        if limited and limited[-1].limit <= now:
            flow = limited.pop()
            stop(flow, flow.limit)
            continue
        heappop(levels)
        floor = now  # rounding must not leave the last flows of a link nothing
        for flow in link.flows:
            if flow not in rates:
                stop(flow, now)
    return rates
