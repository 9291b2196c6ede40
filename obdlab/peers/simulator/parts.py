"""The parts of a simulated swarm: hosts, containers, blocks on their way, and connections."""

from __future__ import annotations

from collections import deque
from typing import Any

from obdlab.peers.simulator.network import Flow, Link

_NEVER = float("inf")


class Host:
    """A host with its two links: the blocks that it holds, gets and knows the sources of."""

    __slots__ = (
        "channels", "down", "flights", "free_at", "gone", "held", "held_bytes", "is_origin", "name", "places",
        "received", "rtt_s", "sent", "service_s", "slow", "up",
    )  # fmt: skip

    def __init__(self, name: str, up: float, down: float, rtt_s: float, service_s: float) -> None:
        self.name, self.rtt_s, self.service_s = name, rtt_s, service_s
        self.up, self.down = Link(up), Link(down)
        self.held: dict[int, None] = {}  # least recently used first
        self.held_bytes = 0
        self.flights: dict[int, Flight] = {}
        self.channels: dict[Host, Channel] = {}
        self.places: dict[int, tuple[Host, int, float]] = {}
        self.free_at = 0.0
        self.slow = 1.0
        self.is_origin = False
        self.gone = False
        # Bytes by second.
        self.sent: dict[int, int] = {}
        self.received: dict[int, int] = {}


class Flight:
    """A block on its way to ``host``: ``above`` is the same block's flight to the source, if it is not there yet."""

    __slots__ = (
        "above", "begun_s", "block", "channel", "dead", "done", "first_s", "followers", "host", "opening", "rate",
        "readers", "source", "tails",
    )  # fmt: skip

    def __init__(self, host: Host, source: Host, block: int) -> None:
        self.host, self.source, self.block = host, source, block
        self.channel: Channel | None = None
        self.above: Flight | None = None
        self.readers: list[Container] = []
        self.followers: list[Flight] = []
        self.tails: list[tuple[Flight, float]] = []
        self.begun_s = -1.0
        #: In bytes per second, when the last byte was sent.
        self.rate = 0.0
        #: When the first unit had come in; ``opening``: an event will set it.
        self.first_s = _NEVER
        self.opening = False
        self.done = False
        #: Its host or its source has left.
        self.dead = False


class Channel(Flow):
    """The connection between a host and one of its sources: one block after the other."""

    __slots__ = ("flight", "growing", "queue", "rtt_s")

    def __init__(self, source: Host, target: Host, sent: Any, limit: float) -> None:
        super().__init__(source.up, target.down, sent, limit)
        self.rtt_s = source.rtt_s
        self.queue: deque[Flight] = deque()
        self.flight: Flight | None = None
        self.growing = False


class Container:
    """A start on a host: ``step`` is the next one, and ``missing`` the blocks that this one still waits for."""

    __slots__ = ("began_s", "host", "missing", "number", "slow", "step")

    def __init__(self, number: int, host: Host, began_s: float, slow: float) -> None:
        self.number, self.host, self.began_s, self.slow = number, host, began_s, slow
        self.step = 0
        self.missing = 0
